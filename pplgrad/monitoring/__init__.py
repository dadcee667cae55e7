"""What a training run shows of itself: `Watch` and event files."""

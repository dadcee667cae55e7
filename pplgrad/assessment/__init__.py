"""Whether a guide has fitted: statistics of its draws and importance weights, the same for both libraries."""

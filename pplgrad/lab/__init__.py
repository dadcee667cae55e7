"""The laboratory: compare estimators on a model script. Uses the plug-ins through their public interface only."""

"""Certificates of unbiasedness and the choice of estimators by measurement, for either library."""

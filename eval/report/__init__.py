"""Reports, plots and mirrors of results."""

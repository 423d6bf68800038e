"""Sections of a report on timings of single parts."""

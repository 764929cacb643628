"""Readers and writers of the ways people keep pictures with their captions; one file per layout."""

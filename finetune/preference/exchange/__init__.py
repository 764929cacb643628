"""Judgements in the forms of other data sets: one file a form, each with `read_<form>` and `write_<form>`."""

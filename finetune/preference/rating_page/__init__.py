"""The local page on which people compare pictures: a guarded server and one static page."""

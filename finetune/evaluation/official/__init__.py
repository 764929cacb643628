"""Official benchmark forms: pictures laid out as each grader expects them, and its results read back as numbers."""

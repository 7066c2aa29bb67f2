"""`mirage-ds replay`: a step of a run taken again, to be looked at."""

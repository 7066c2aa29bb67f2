"""`mirage-ds data rationalize`: a model writes the text around the helper of rows that have only an answer."""

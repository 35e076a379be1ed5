"""One tool call from request to result: validate, decide, journal, execute, record."""

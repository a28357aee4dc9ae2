"""Which sketch goes where."""

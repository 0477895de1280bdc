"""What api.py serves with: shapes of requests and responses, the socket side, threads, the log."""

# Said here alone; CHANGELOG.md has a section of this name.
__version__ = "0.1.0"

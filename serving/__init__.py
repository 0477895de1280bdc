"""What api.py serves with: shapes of requests and responses, the socket side, threads, the log."""

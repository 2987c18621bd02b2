"""Acts: starts processes, moves bytes and keeps durable truth; contains no mathematics."""

"""Servers that generate and score over HTTP, the client that talks to them, and what starts and ends them."""

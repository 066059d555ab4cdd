"""Recipes: each folder is one that runs, and that a user copies and edits."""

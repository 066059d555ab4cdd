"""Checks that need a machine which tests do not have."""

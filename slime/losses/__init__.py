"""Losses as pure functions of tensors and floats: no arguments object, no model, no distributed call."""

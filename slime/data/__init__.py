"""From rows of a data set to groups of samples: reading, pictures, templates, order and resumable state."""

"""The import paths that slime users know: `types`, `processing_utils`, `http_utils`, `misc`."""

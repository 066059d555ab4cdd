"""What a run tells about itself: a line per rollout, `metrics.jsonl`, a closing table, a picture."""

"""From prompts to scored samples: the student answers, the teacher and the task's rule judge, plugins
decide."""

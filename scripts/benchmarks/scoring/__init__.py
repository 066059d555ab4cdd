"""Parts of the teacher-scoring benchmark (`scripts/benchmarks/teacher_scoring.py`)."""

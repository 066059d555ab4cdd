"""A pre-flight of a teacher's server: `python -m slime.engines.doctor --teacher-url … --student-path …`.

It asks a live server what a run will ask, compares the answers with what must come back, and names what is
wrong with its remedy. Before the first rollout, not during one; it changes nothing on the server.

`examination.py` holds the order of the checks; `scoring.py`, `agreement.py`, `capacity.py` and
`sameness.py` what they ask, `receipt.py` what answers may look like, `material.py` the probes.
"""

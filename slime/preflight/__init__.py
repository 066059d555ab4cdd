"""What a launcher asks of the machine before any model is loaded: can this run work here?

Each check is a function of what is to run (`launch.py`) and of what is there, and yields findings; all of
them are shown at once, each with a remedy. Nothing here loads a model or imports torch. Estimates of memory
and disk are lower bounds: an error means that the run surely fails, a warning that it may.
"""

"""Parts of the benchmark of training: the two ways, each in a process of its own, and what they train on."""

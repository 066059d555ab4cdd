"""Stand-ins that let an unmodified SGLang run without CUDA; this folder is on SGLang's module path alone."""

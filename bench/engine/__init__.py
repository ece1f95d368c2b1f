"""A vLLM that fits on a laptop: the real one on CPU (``real``), and a simulator fitted on it (``model``, ``server``)."""

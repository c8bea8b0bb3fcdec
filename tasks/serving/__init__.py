"""Hand a version over to other programs: exports, and folders for vLLM servers."""

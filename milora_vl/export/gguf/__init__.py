"""Models and adapters as GGUF, the file format of llama.cpp and Ollama."""

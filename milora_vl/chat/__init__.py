"""Ask a model about pictures, in the terminal or in a browser."""

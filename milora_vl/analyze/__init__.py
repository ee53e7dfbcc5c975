"""What is in a weight and what an adapter did to it: measures, weights read layer by layer, tables and figures."""

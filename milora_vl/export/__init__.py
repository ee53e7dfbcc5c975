"""What `milora_vl.export` does: read an adapter folder of any origin, write it in another form."""

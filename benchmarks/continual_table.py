def write_summary(out): pass

"""The FUSE side: a thin adapter over `vfs`, and the life of a mounted session. pyfuse3 appears nowhere else."""

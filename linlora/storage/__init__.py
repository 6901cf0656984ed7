"""Files and folders: atomic writes, tensor files with checksums, folders of runs."""

"""One file per dataset format; the file names are the registry."""

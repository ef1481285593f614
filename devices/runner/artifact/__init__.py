"""An artifact folder: its manifest, files and graphs, checked before anything is loaded."""

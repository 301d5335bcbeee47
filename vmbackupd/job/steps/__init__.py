"""The steps of a backup, one file each; ``job/pipeline.py`` lists them in order."""

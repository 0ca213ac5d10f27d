"""A directory, a dump or a tree → an image, and its objects in a store.

`image` is the order of a build, `scan` the walk through a directory; `contents` gives the files it finds to `workers`,
which do what `hashing` says, into a `store`. Nothing has its name before all is well: `staging`, `destination`.
"""

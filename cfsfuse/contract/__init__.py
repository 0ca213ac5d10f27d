"""The contract: what a mount of an image has to look like, held against any other mount of it and against the image.

A check looks at one entry of one mount and returns what it observes, by name: it knows nothing of other mounts, nor of
what is right. `differences` makes the same observations on two mounts, `comparison` on any number of them and on the
image itself; what differs and is not in `justified` is reported. The former is for tests, the latter for `cfsfuse
compare`, where `watched` makes it in a process of its own. So a check cannot be wrong, only blind, and a call
that fails is as good an observation as one that succeeds: its errno is what is compared.

`observe` → `entries` → `metadata`, `names`, `contents`, `opening`, `changing` → `checks` → `differences`,
`comparison` → `watched`.

Modifying calls are made in earnest, and must fail: mounts have to be read-only, which is checked first.
"""

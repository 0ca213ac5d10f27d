"""The EROFS side of a composefs image: bytes → image → inode, dirent, xattr → what the kernel mount shows.

Format: https://docs.kernel.org/filesystems/erofs.html and the kernel's fs/erofs/erofs_fs.h.
"""

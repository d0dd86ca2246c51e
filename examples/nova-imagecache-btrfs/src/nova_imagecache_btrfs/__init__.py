"""A backend of nova-imagecache on btrfs: a base is a read-only subvolume, a root disk its writable snapshot."""

from nova_imagecache_btrfs._backend import BtrfsBackend as BtrfsBackend

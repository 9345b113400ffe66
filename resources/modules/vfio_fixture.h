/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * vfio_fixture - what the test bed's devices have in common: the migration
 * state machine with its stream, the log of DMA writes, and injected faults.
 *
 * A device embeds a struct fixture, describes itself with struct fixture_ops,
 * and hands fixture_<...>_ops made by FIXTURE_VFIO_OPS() to the VFIO core.
 */
#ifndef VFIO_FIXTURE_H
#define VFIO_FIXTURE_H

#include <linux/interval_tree.h>
#include <linux/iova_bitmap.h>
#include <linux/mutex.h>
#include <linux/vfio.h>
#include <linux/xarray.h>

struct fixture;
struct migration_file;

/**
 * struct fixture_ops - a device, as its migration sees it
 * @kind: names the kind of device in the stream; at most 15 characters.
 * @state_size: bytes of the device's own state in the stream.
 * @set_dma: allow the device to start DMA; or keep it from starting more, and
 *	return when none is in flight.
 * @save: write the state of a device that may still be running.
 * @load: take over a saved state; the device is stopped. Its content was
 *	checksummed but may still make no sense: then -EINVAL.
 * @reset: return the device to the state it had when opened; DMA is stopped.
 * @changes: optional; a number that grows with every change of the state. A
 *	device that has it sends newer state while it runs, in PRE_COPY.
 * @settle: optional; called before the log is read, to wait for writes that are
 *	not logged yet, or to end a fixture_log_hold() whose DMA has completed.
 */
struct fixture_ops {
	const char *kind;
	size_t state_size;
	int (*set_dma)(struct fixture *f, bool allowed);
	int (*save)(struct fixture *f, void *state);
	int (*load)(struct fixture *f, const void *state);
	void (*reset)(struct fixture *f);
	u64 (*changes)(struct fixture *f);
	void (*settle)(struct fixture *f);
};

/* The part of the IOVA space where DMA writes are logged, and what was logged. */
struct fixture_log {
	struct mutex lock;
	bool started;
	bool broken;		/* an error was reported: sticky until stopped */
	unsigned long granule;
	unsigned int nr_ranges;
	struct { unsigned long first, last; } *ranges;
	struct xarray dirty;	/* index: iova >> PAGE_SHIFT */
	bool held;		/* DMA is in flight to hold_first..=hold_last */
	unsigned long hold_first, hold_last;
};

struct fixture {
	struct vfio_device *vdev;
	const struct fixture_ops *ops;
	struct mutex state_lock;
	enum vfio_device_mig_state state;
	struct migration_file *saving;
	struct migration_file *resuming;
	struct fixture_log log;
};

void fixture_init(struct fixture *f, struct vfio_device *vdev,
		  const struct fixture_ops *ops);
void fixture_open(struct fixture *f);
void fixture_close(struct fixture *f);
void fixture_reset(struct fixture *f);

/* True when the fault that a parameter asks for is meant for this device. */
bool fixture_is_target(struct fixture *f);

struct file *fixture_set_state(struct fixture *f,
			       enum vfio_device_mig_state state);
int fixture_get_state(struct fixture *f, enum vfio_device_mig_state *state);
int fixture_data_size(struct fixture *f, unsigned long *bytes);

void fixture_log_init(struct fixture_log *log);
int fixture_log_start(struct fixture *f, struct rb_root_cached *ranges,
		      u32 nr_ranges, u64 *page_size);
int fixture_log_stop(struct fixture *f);
int fixture_log_report(struct fixture *f, unsigned long iova,
		       unsigned long length, struct iova_bitmap *dirty);

/* Records a DMA write that has landed. */
void fixture_log_write(struct fixture *f, unsigned long iova, size_t length);

/*
 * Records a DMA write that was started: its pages are reported at once, and
 * stay dirty however often they are reported, until fixture_log_release().
 */
void fixture_log_hold(struct fixture *f, unsigned long iova, size_t length);
void fixture_log_release(struct fixture *f);

/* Defines <name>_migration_ops and <name>_log_ops over to_fixture(vdev). */
#define FIXTURE_VFIO_OPS(name, to_fixture)				\
static struct file *name##_set_state(struct vfio_device *vdev,		\
				     enum vfio_device_mig_state state)	\
{									\
	return fixture_set_state(to_fixture(vdev), state);		\
}									\
static int name##_get_state(struct vfio_device *vdev,			\
			    enum vfio_device_mig_state *state)		\
{									\
	return fixture_get_state(to_fixture(vdev), state);		\
}									\
static int name##_data_size(struct vfio_device *vdev,			\
			    unsigned long *bytes)			\
{									\
	return fixture_data_size(to_fixture(vdev), bytes);		\
}									\
static const struct vfio_migration_ops name##_migration_ops = {	\
	.migration_set_state = name##_set_state,			\
	.migration_get_state = name##_get_state,			\
	.migration_get_data_size = name##_data_size,			\
};									\
static int name##_log_start(struct vfio_device *vdev,			\
			    struct rb_root_cached *ranges, u32 nr,	\
			    u64 *page_size)				\
{									\
	return fixture_log_start(to_fixture(vdev), ranges, nr, page_size); \
}									\
static int name##_log_stop(struct vfio_device *vdev)			\
{									\
	return fixture_log_stop(to_fixture(vdev));			\
}									\
static int name##_log_report(struct vfio_device *vdev,			\
			     unsigned long iova, unsigned long length,	\
			     struct iova_bitmap *dirty)			\
{									\
	return fixture_log_report(to_fixture(vdev), iova, length, dirty); \
}									\
static const struct vfio_log_ops name##_log_ops = {			\
	.log_start = name##_log_start,					\
	.log_stop = name##_log_stop,					\
	.log_read_and_clear = name##_log_report,			\
}

#endif

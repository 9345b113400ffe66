// SPDX-License-Identifier: GPL-2.0-only
/*
 * dirty_mdev - a mediated device that dirties memory as fast as one asks.
 *
 * A kernel thread writes a pseudo-random stream of words to windows of guest
 * memory with vfio_dma_rw(), as the DMA engine of a device would. So what the
 * container's bitmap says of it is exact, and so is its own log. It migrates:
 * see vfio_fixture.h. Its registers are in dirty_mdev.h.
 */
#include <linux/device.h>
#include <linux/kthread.h>
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>
#include <linux/wait.h>

#include "dirty_mdev.h"
#include "vfio_fixture.h"

/* Writes done under one hold of the engine's lock. */
#define BATCH		64
/* Time the engine catches up with at most, after it was held up. */
#define BACKLOG_NS	(100 * NSEC_PER_MSEC)

#define REGION_SHIFT	40
#define CONFIG_BYTES	PCI_CFG_SPACE_SIZE

static unsigned int mig_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
				VFIO_MIGRATION_PRE_COPY;
module_param(mig_flags, uint, 0644);
MODULE_PARM_DESC(mig_flags, "Migration flags of a device opened from now on; 0: it does not migrate");

static bool log_ops = true;
module_param(log_ops, bool, 0644);
MODULE_PARM_DESC(log_ops, "A device opened from now on can log its DMA");

struct window {
	u64 iova;
	u64 length;
};

/**
 * struct dirty_mdev
 * @lock: the engine and its registers; held over every DMA, so that none is
 *	in flight when it is free.
 * @dma_allowed: the migration state lets the device start DMA.
 * @changes: grows with every change of the state that migrates.
 * @config: the PCI configuration space; under @lock, and no state that migrates:
 *	a VMM moves what its guest wrote there itself.
 * @high_half: written by a 4-byte access, and waiting for its low half.
 * @pins_lock: of @pins; apart from @lock, as the container calls back with
 *	locks of its own held.
 * @pins: pinned pages, by iova >> PAGE_SHIFT.
 */
struct dirty_mdev {
	struct vfio_device vdev;
	struct fixture fixture;
	struct mutex lock;
	bool dma_allowed;
	u64 changes;
	u64 control, seed, position, count, errors, rate;
	struct window windows[DIRTY_MDEV_WINDOWS];
	u8 config[CONFIG_BYTES];
	u32 high_half;
	struct task_struct *engine;
	wait_queue_head_t wake;
	struct mutex pins_lock;
	struct xarray pins;
	u64 pinned;
};

struct dirty_mdev_state {
	__le64 control, seed, position, count, errors, rate;
	struct {
		__le64 iova, length;
	} windows[DIRTY_MDEV_WINDOWS];
};

static struct dirty_mdev *to_dirty_mdev(struct vfio_device *vdev)
{
	return container_of(vdev, struct dirty_mdev, vdev);
}

static struct dirty_mdev *from_fixture(struct fixture *f)
{
	return container_of(f, struct dirty_mdev, fixture);
}

static struct fixture *to_fixture(struct vfio_device *vdev)
{
	return &to_dirty_mdev(vdev)->fixture;
}

/* --- the engine ---------------------------------------------------------- */

static u64 stream_word(u64 seed, u64 n)
{
	u64 z = seed + (n + 1) * 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

static u64 total_slots(const struct dirty_mdev *d)
{
	u64 slots = 0;
	int i;

	for (i = 0; i < DIRTY_MDEV_WINDOWS; i++)
		slots += d->windows[i].length / sizeof(u64);
	return slots;
}

static u64 slot_iova(const struct dirty_mdev *d, u64 slot)
{
	int i = 0;

	while (slot >= d->windows[i].length / sizeof(u64))
		slot -= d->windows[i++].length / sizeof(u64);
	return d->windows[i].iova + slot * sizeof(u64);
}

static int dma_write(struct dirty_mdev *d, u64 iova, u64 word)
{
	int ret = vfio_dma_rw(&d->vdev, iova, &word, sizeof(word), true);

	if (!ret)
		fixture_log_write(&d->fixture, iova, sizeof(word));
	return ret;
}

/* The stream's next write; it counts as drawn even where it is refused. */
static int write_next(struct dirty_mdev *d)
{
	u64 slots = total_slots(d);
	u64 slot, word;
	int ret;

	lockdep_assert_held(&d->lock);
	if (!slots)
		return -EFAULT;
	slot = stream_word(d->seed, 2 * d->position) % slots;
	word = stream_word(d->seed, 2 * d->position + 1);
	ret = dma_write(d, slot_iova(d, slot), cpu_to_le64(word));

	d->position++;
	d->changes++;
	if (ret)
		d->errors++;
	else
		d->count++;
	return ret ? -EFAULT : 0;
}

static bool engine_runs(const struct dirty_mdev *d)
{
	return READ_ONCE(d->dma_allowed) && READ_ONCE(d->rate) &&
	       (READ_ONCE(d->control) & DIRTY_MDEV_CONTROL_RUN);
}

/* Does the writes that fell due in @elapsed; @carry keeps the fraction left. */
static void engine_catch_up(struct dirty_mdev *d, u64 elapsed, u64 *carry)
{
	u64 rate = min_t(u64, READ_ONCE(d->rate), NSEC_PER_SEC);
	u64 due = min_t(u64, elapsed, BACKLOG_NS) * rate + *carry;
	u64 n;

	for (n = due / NSEC_PER_SEC; n && !kthread_should_stop(); ) {
		mutex_lock(&d->lock);
		if (!engine_runs(d))
			n = 0;
		for (int i = 0; i < BATCH && n; i++, n--)
			write_next(d);
		mutex_unlock(&d->lock);
		cond_resched();
	}
	*carry = due % NSEC_PER_SEC;
}

static int engine_thread(void *data)
{
	struct dirty_mdev *d = data;
	u64 last = ktime_get_ns(), carry = 0;

	while (!kthread_should_stop()) {
		u64 now = ktime_get_ns();

		if (engine_runs(d)) {
			engine_catch_up(d, now - last, &carry);
			last = now;
			schedule_timeout_interruptible(1);
		} else {
			wait_event_interruptible(d->wake, engine_runs(d) ||
						 kthread_should_stop());
			last = ktime_get_ns();
		}
	}
	return 0;
}

static int burst(struct dirty_mdev *d, u64 n)
{
	int ret = 0;

	while (n && ret != -EBUSY) {
		if (signal_pending(current))
			return -EINTR;
		mutex_lock(&d->lock);
		if (!d->dma_allowed)
			ret = -EBUSY;
		for (int i = 0; i < BATCH && n && ret != -EBUSY; i++, n--)
			ret = write_next(d) ?: ret;
		mutex_unlock(&d->lock);
		cond_resched();
	}
	return ret;
}

static int write_at(struct dirty_mdev *d, u64 iova)
{
	int ret = -EBUSY;

	mutex_lock(&d->lock);
	if (d->dma_allowed)
		ret = dma_write(d, iova, cpu_to_le64(~iova)) ? -EFAULT : 0;
	mutex_unlock(&d->lock);
	return ret;
}

/* --- pinned pages -------------------------------------------------------- */

static int pin(struct dirty_mdev *d, u64 iova)
{
	struct page *page;
	int ret;

	mutex_lock(&d->pins_lock);
	ret = -EEXIST;
	if (xa_load(&d->pins, iova >> PAGE_SHIFT))
		goto unlock;
	ret = vfio_pin_pages(&d->vdev, iova, 1, IOMMU_READ | IOMMU_WRITE,
			     &page);
	if (ret != 1) {
		ret = ret < 0 ? ret : -EFAULT;
		goto unlock;
	}
	ret = xa_err(xa_store(&d->pins, iova >> PAGE_SHIFT, page, GFP_KERNEL));
	if (ret)
		vfio_unpin_pages(&d->vdev, iova, 1);
	else
		d->pinned++;
unlock:
	mutex_unlock(&d->pins_lock);
	return ret;
}

static void unpin(struct dirty_mdev *d, u64 iova, u64 length)
{
	unsigned long page;
	void *entry;

	mutex_lock(&d->pins_lock);
	xa_for_each_range(&d->pins, page, entry, iova >> PAGE_SHIFT,
			  (iova + length - 1) >> PAGE_SHIFT) {
		xa_erase(&d->pins, page);
		vfio_unpin_pages(&d->vdev, (dma_addr_t)page << PAGE_SHIFT, 1);
		d->pinned--;
	}
	mutex_unlock(&d->pins_lock);
}

/* --- migration ----------------------------------------------------------- */

static int dirty_mdev_set_dma(struct fixture *f, bool allowed)
{
	struct dirty_mdev *d = from_fixture(f);

	mutex_lock(&d->lock);
	d->dma_allowed = allowed;
	mutex_unlock(&d->lock);
	wake_up(&d->wake);
	return 0;
}

static int dirty_mdev_save(struct fixture *f, void *data)
{
	struct dirty_mdev *d = from_fixture(f);
	struct dirty_mdev_state *state = data;
	int i;

	mutex_lock(&d->lock);
	state->control = cpu_to_le64(d->control);
	state->seed = cpu_to_le64(d->seed);
	state->position = cpu_to_le64(d->position);
	state->count = cpu_to_le64(d->count);
	state->errors = cpu_to_le64(d->errors);
	state->rate = cpu_to_le64(d->rate);
	for (i = 0; i < DIRTY_MDEV_WINDOWS; i++) {
		state->windows[i].iova = cpu_to_le64(d->windows[i].iova);
		state->windows[i].length = cpu_to_le64(d->windows[i].length);
	}
	mutex_unlock(&d->lock);
	return 0;
}

static int dirty_mdev_load(struct fixture *f, const void *data)
{
	struct dirty_mdev *d = from_fixture(f);
	const struct dirty_mdev_state *state = data;
	int i;

	mutex_lock(&d->lock);
	d->control = le64_to_cpu(state->control);
	d->seed = le64_to_cpu(state->seed);
	d->position = le64_to_cpu(state->position);
	d->count = le64_to_cpu(state->count);
	d->errors = le64_to_cpu(state->errors);
	d->rate = le64_to_cpu(state->rate);
	for (i = 0; i < DIRTY_MDEV_WINDOWS; i++) {
		d->windows[i].iova = le64_to_cpu(state->windows[i].iova);
		d->windows[i].length = le64_to_cpu(state->windows[i].length);
	}
	d->changes++;
	mutex_unlock(&d->lock);
	return 0;
}

static void dirty_mdev_reset(struct fixture *f)
{
	static const struct dirty_mdev_state zero;

	dirty_mdev_load(f, &zero);
	unpin(from_fixture(f), 0, U64_MAX);
}

static u64 dirty_mdev_changes(struct fixture *f)
{
	return READ_ONCE(from_fixture(f)->changes);
}

/* Waits for the write that the engine is doing, which is logged when it is done. */
static void dirty_mdev_settle(struct fixture *f)
{
	struct dirty_mdev *d = from_fixture(f);

	mutex_lock(&d->lock);
	mutex_unlock(&d->lock);
}

static const struct fixture_ops dirty_mdev_fixture_ops = {
	.kind = "dirty_mdev",
	.state_size = sizeof(struct dirty_mdev_state),
	.set_dma = dirty_mdev_set_dma,
	.save = dirty_mdev_save,
	.load = dirty_mdev_load,
	.reset = dirty_mdev_reset,
	.changes = dirty_mdev_changes,
	.settle = dirty_mdev_settle,
};

FIXTURE_VFIO_OPS(dirty_mdev, to_fixture);

/* --- PCI configuration space ---------------------------------------------- */

/* As vfio-pci leaves a device it opened: it answers at its BAR. */
static void config_reset(struct dirty_mdev *d)
{
	mutex_lock(&d->lock);
	memset(d->config, 0, sizeof(d->config));
	put_unaligned_le16(DIRTY_MDEV_VENDOR, d->config + PCI_VENDOR_ID);
	put_unaligned_le16(DIRTY_MDEV_DEVICE, d->config + PCI_DEVICE_ID);
	put_unaligned_le16(PCI_COMMAND_MEMORY, d->config + PCI_COMMAND);
	put_unaligned_le16(PCI_CLASS_SYSTEM_OTHER, d->config + PCI_CLASS_DEVICE);
	d->high_half = 0;
	mutex_unlock(&d->lock);
}

/* Which bits of a byte a guest may write; the BAR's size shows in those it may not. */
static u8 config_mask(u64 offset)
{
	const u16 command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
			    PCI_COMMAND_INTX_DISABLE;
	const u32 bar = ~(DIRTY_MDEV_BAR_BYTES - 1);

	switch (offset) {
	case PCI_COMMAND ... PCI_COMMAND + 1:
		return command >> (8 * (offset - PCI_COMMAND));
	case PCI_BASE_ADDRESS_0 ... PCI_BASE_ADDRESS_0 + 3:
		return bar >> (8 * (offset - PCI_BASE_ADDRESS_0));
	case PCI_CACHE_LINE_SIZE:
	case PCI_INTERRUPT_LINE:
		return 0xff;
	}
	return 0;
}

static bool memory_enabled(const struct dirty_mdev *d)
{
	lockdep_assert_held(&d->lock);
	return get_unaligned_le16(d->config + PCI_COMMAND) & PCI_COMMAND_MEMORY;
}

static ssize_t config_read(struct dirty_mdev *d, char __user *buf, size_t n,
			   u64 offset)
{
	u8 copy[CONFIG_BYTES];

	if (offset >= CONFIG_BYTES)
		return -EINVAL;
	mutex_lock(&d->lock);
	memcpy(copy, d->config, sizeof(copy));
	mutex_unlock(&d->lock);
	n = min_t(size_t, n, CONFIG_BYTES - offset);
	return copy_to_user(buf, copy + offset, n) ? -EFAULT : n;
}

static ssize_t config_write(struct dirty_mdev *d, const char __user *buf,
			    size_t n, u64 offset)
{
	u8 bytes[CONFIG_BYTES];
	size_t i;

	if (offset >= CONFIG_BYTES)
		return -EINVAL;
	n = min_t(size_t, n, CONFIG_BYTES - offset);
	if (copy_from_user(bytes, buf, n))
		return -EFAULT;
	mutex_lock(&d->lock);
	for (i = 0; i < n; i++) {
		u8 mask = config_mask(offset + i);
		u8 *byte = d->config + offset + i;

		*byte = (*byte & ~mask) | (bytes[i] & mask);
	}
	mutex_unlock(&d->lock);
	return n;
}

/* --- registers ----------------------------------------------------------- */

/* Where the register at @offset lies if a user may just read and write it. */
static u64 *plain_register(struct dirty_mdev *d, u64 offset)
{
	u64 i = (offset - DIRTY_MDEV_REG_WINDOW) / 16;

	if (offset == DIRTY_MDEV_REG_CONTROL)
		return &d->control;
	if (offset == DIRTY_MDEV_REG_RATE)
		return &d->rate;
	if (offset < DIRTY_MDEV_REG_WINDOW || i >= DIRTY_MDEV_WINDOWS)
		return NULL;
	return offset & 8 ? &d->windows[i].length : &d->windows[i].iova;
}

static u64 bar_read(struct dirty_mdev *d, u64 offset)
{
	u64 *plain = plain_register(d, offset);

	if (plain)
		return *plain;
	switch (offset) {
	case DIRTY_MDEV_REG_ID:
		return DIRTY_MDEV_ID;
	case DIRTY_MDEV_REG_SEED:
		return d->seed;
	case DIRTY_MDEV_REG_POSITION:
		return d->position;
	case DIRTY_MDEV_REG_COUNT:
		return d->count;
	case DIRTY_MDEV_REG_ERRORS:
		return d->errors;
	case DIRTY_MDEV_REG_PINNED:
		return d->pinned;
	}
	return 0;
}

static int set_register(struct dirty_mdev *d, u64 offset, u64 value)
{
	u64 *plain = plain_register(d, offset);

	if (offset >= DIRTY_MDEV_REG_WINDOW && value % sizeof(u64))
		return -EINVAL;
	mutex_lock(&d->lock);
	if (plain) {
		*plain = value;
	} else {
		d->seed = value;
		d->position = 0;
	}
	d->changes++;
	mutex_unlock(&d->lock);
	wake_up(&d->wake);
	return 0;
}

static int bar_write(struct dirty_mdev *d, u64 offset, u64 value)
{
	switch (offset) {
	case DIRTY_MDEV_REG_BURST:
		return burst(d, value);
	case DIRTY_MDEV_REG_WRITE_AT:
		return write_at(d, value);
	case DIRTY_MDEV_REG_PIN:
		return pin(d, value);
	case DIRTY_MDEV_REG_UNPIN:
		unpin(d, value, 1);
		return 0;
	}
	if (offset != DIRTY_MDEV_REG_SEED && !plain_register(d, offset))
		return -EINVAL;
	return set_register(d, offset, value);
}

/* A register at once, or one of its halves. */
static bool is_bar_access(u64 offset, size_t n)
{
	return (n == sizeof(u64) || n == sizeof(u32)) && offset % n == 0 &&
	       offset < DIRTY_MDEV_BAR_BYTES;
}

static ssize_t bar_read_user(struct dirty_mdev *d, char __user *buf, size_t n,
			     u64 offset)
{
	u64 value;

	if (!is_bar_access(offset, n))
		return -EINVAL;
	mutex_lock(&d->lock);
	if (!memory_enabled(d)) {
		mutex_unlock(&d->lock);
		return -EIO;
	}
	value = bar_read(d, round_down(offset, sizeof(u64)));
	mutex_unlock(&d->lock);
	value >>= 8 * (offset % sizeof(u64));
	return copy_to_user(buf, &value, n) ? -EFAULT : n;
}

/* Keeps a high half, or joins a low one with it; returns 1 when @value is whole. */
static int join_halves(struct dirty_mdev *d, u64 offset, size_t n, u64 *value)
{
	int ret = 1;

	mutex_lock(&d->lock);
	if (!memory_enabled(d)) {
		ret = -EIO;
	} else if (offset % sizeof(u64)) {
		d->high_half = *value;
		ret = 0;
	} else if (n == sizeof(u32)) {
		*value |= (u64)d->high_half << 32;
		d->high_half = 0;
	}
	mutex_unlock(&d->lock);
	return ret;
}

static ssize_t bar_write_user(struct dirty_mdev *d, const char __user *buf,
			      size_t n, u64 offset)
{
	u64 value = 0;
	int ret;

	if (!is_bar_access(offset, n))
		return -EINVAL;
	if (copy_from_user(&value, buf, n))
		return -EFAULT;
	ret = join_halves(d, offset, n, &value);
	if (ret > 0)
		ret = bar_write(d, offset, value);
	return ret ?: n;
}

static ssize_t dirty_mdev_read(struct vfio_device *vdev, char __user *buf,
			       size_t n, loff_t *pos)
{
	u64 offset = *pos & ((1ULL << REGION_SHIFT) - 1);

	switch (*pos >> REGION_SHIFT) {
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return config_read(to_dirty_mdev(vdev), buf, n, offset);
	case VFIO_PCI_BAR0_REGION_INDEX:
		return bar_read_user(to_dirty_mdev(vdev), buf, n, offset);
	}
	return -EINVAL;
}

static ssize_t dirty_mdev_write(struct vfio_device *vdev,
				const char __user *buf, size_t n, loff_t *pos)
{
	u64 offset = *pos & ((1ULL << REGION_SHIFT) - 1);

	switch (*pos >> REGION_SHIFT) {
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return config_write(to_dirty_mdev(vdev), buf, n, offset);
	case VFIO_PCI_BAR0_REGION_INDEX:
		return bar_write_user(to_dirty_mdev(vdev), buf, n, offset);
	}
	return -EINVAL;
}

/* --- ioctls -------------------------------------------------------------- */

static long device_info(void __user *arg)
{
	size_t minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long region_info(void __user *arg)
{
	size_t minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_region_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info.flags = 0;
	info.cap_offset = 0;
	info.size = 0;
	info.offset = (u64)info.index << REGION_SHIFT;
	if (info.index == VFIO_PCI_BAR0_REGION_INDEX)
		info.size = DIRTY_MDEV_BAR_BYTES;
	if (info.index == VFIO_PCI_CONFIG_REGION_INDEX)
		info.size = CONFIG_BYTES;
	if (info.size)
		info.flags = VFIO_REGION_INFO_FLAG_READ |
			     VFIO_REGION_INFO_FLAG_WRITE;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

/* The device interrupts nobody. */
static long irq_info(void __user *arg)
{
	size_t minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info.flags = 0;
	info.count = 0;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long dirty_mdev_ioctl(struct vfio_device *vdev, unsigned int cmd,
			     unsigned long arg)
{
	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return device_info((void __user *)arg);
	case VFIO_DEVICE_GET_REGION_INFO:
		return region_info((void __user *)arg);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return irq_info((void __user *)arg);
	case VFIO_DEVICE_RESET:
		fixture_reset(to_fixture(vdev));
		return 0;
	}
	return -ENOTTY;
}

/* --- the device's life --------------------------------------------------- */

static int dirty_mdev_init(struct vfio_device *vdev)
{
	struct dirty_mdev *d = to_dirty_mdev(vdev);

	mutex_init(&d->lock);
	mutex_init(&d->pins_lock);
	xa_init(&d->pins);
	init_waitqueue_head(&d->wake);
	fixture_init(&d->fixture, vdev, &dirty_mdev_fixture_ops);
	return 0;
}

static void dirty_mdev_release(struct vfio_device *vdev)
{
	xa_destroy(&to_dirty_mdev(vdev)->pins);
}

static int dirty_mdev_open(struct vfio_device *vdev)
{
	struct dirty_mdev *d = to_dirty_mdev(vdev);

	config_reset(d);
	dirty_mdev_reset(&d->fixture);
	vdev->migration_flags = mig_flags;
	vdev->mig_ops = mig_flags ? &dirty_mdev_migration_ops : NULL;
	vdev->log_ops = log_ops ? &dirty_mdev_log_ops : NULL;
	d->engine = kthread_run(engine_thread, d, "dirty_mdev");
	if (IS_ERR(d->engine))
		return PTR_ERR(d->engine);
	fixture_open(&d->fixture);
	return 0;
}

static void dirty_mdev_close(struct vfio_device *vdev)
{
	struct dirty_mdev *d = to_dirty_mdev(vdev);

	fixture_close(&d->fixture);
	kthread_stop(d->engine);
	unpin(d, 0, U64_MAX);
}

static void dirty_mdev_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length)
{
	unpin(to_dirty_mdev(vdev), iova, length);
}

static const struct vfio_device_ops dirty_mdev_ops = {
	.name = "dirty_mdev",
	.init = dirty_mdev_init,
	.release = dirty_mdev_release,
	.open_device = dirty_mdev_open,
	.close_device = dirty_mdev_close,
	.read = dirty_mdev_read,
	.write = dirty_mdev_write,
	.ioctl = dirty_mdev_ioctl,
	.dma_unmap = dirty_mdev_dma_unmap,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

static int dirty_mdev_probe(struct mdev_device *mdev)
{
	struct dirty_mdev *d;
	int ret;

	d = vfio_alloc_device(dirty_mdev, vdev, &mdev->dev, &dirty_mdev_ops);
	if (IS_ERR(d))
		return PTR_ERR(d);
	ret = vfio_register_emulated_iommu_dev(&d->vdev);
	if (ret) {
		vfio_put_device(&d->vdev);
		return ret;
	}
	dev_set_drvdata(&mdev->dev, d);
	return 0;
}

static void dirty_mdev_remove(struct mdev_device *mdev)
{
	struct dirty_mdev *d = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&d->vdev);
	vfio_put_device(&d->vdev);
}

static unsigned int dirty_mdev_available(struct mdev_type *type)
{
	return 64;
}

static struct mdev_driver dirty_mdev_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.driver = {
		.name = "dirty_mdev",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
	},
	.probe = dirty_mdev_probe,
	.remove = dirty_mdev_remove,
	.get_available = dirty_mdev_available,
};

/* --- the parent device that mdevs of our one type are created on ---------- */

static struct class parent_class = { .name = "dirty_mdev" };
static struct device *parent_device;
static struct mdev_parent parent;
static struct mdev_type engine_type = {
	.sysfs_name = "engine",
	.pretty_name = "DMA engine",
};
static struct mdev_type *types[] = { &engine_type };

static int __init dirty_mdev_module_init(void)
{
	int ret = mdev_register_driver(&dirty_mdev_driver);

	if (ret)
		return ret;
	ret = class_register(&parent_class);
	if (ret)
		goto unregister_driver;
	parent_device = device_create(&parent_class, NULL, MKDEV(0, 0), NULL,
				      "dirty_mdev");
	if (IS_ERR(parent_device)) {
		ret = PTR_ERR(parent_device);
		goto unregister_class;
	}
	ret = mdev_register_parent(&parent, parent_device, &dirty_mdev_driver,
				   types, ARRAY_SIZE(types));
	if (ret)
		goto unregister_device;
	return 0;

unregister_device:
	device_unregister(parent_device);
unregister_class:
	class_unregister(&parent_class);
unregister_driver:
	mdev_unregister_driver(&dirty_mdev_driver);
	return ret;
}

static void __exit dirty_mdev_module_exit(void)
{
	mdev_unregister_parent(&parent);
	device_unregister(parent_device);
	class_unregister(&parent_class);
	mdev_unregister_driver(&dirty_mdev_driver);
}

module_init(dirty_mdev_module_init);
module_exit(dirty_mdev_module_exit);
MODULE_DESCRIPTION("Mediated device that dirties memory");
MODULE_LICENSE("GPL");

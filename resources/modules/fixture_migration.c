// SPDX-License-Identifier: GPL-2.0-only
/*
 * Migration of the test bed's devices, behind VFIO_DEVICE_FEATURE_MIG_*.
 *
 * The stream, little endian:
 *
 *	struct stream_header	which kind of device, and the sizes that follow
 *	padding			bytes of a fixed pattern, to make a state large
 *	struct stream_record	STATE, then the device's state; the last one
 *	...			counts, the ones before were sent in PRE_COPY
 *	struct stream_record	END; nothing follows
 *
 * Header and padding are the initial bytes of PRE_COPY. A record's checksum
 * covers the whole stream before it, and a STATE record's the state after it
 * too. The image is validated when the device leaves RESUMING.
 */
#include <linux/anon_inodes.h>
#include <linux/crc32.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "vfio_fixture.h"

#define STREAM_MAGIC	0x54584656	/* "VFXT" */
#define STREAM_VERSION	1
#define RECORD_STATE	0x54415453	/* "STAT" */
#define RECORD_END	0x20444e45	/* "END " */
#define IMAGE_BYTES_MAX	(16UL << 20)
/* After so many bytes the padding repeats, and so many are made up at once. */
#define PADDING_PERIOD	(64UL << 10)

static unsigned int state_padding;
module_param(state_padding, uint, 0644);
MODULE_PARM_DESC(state_padding, "Bytes of padding in a saved state, made up as they are read");

static unsigned int arc_delay_ms;
module_param(arc_delay_ms, uint, 0644);
MODULE_PARM_DESC(arc_delay_ms, "How long every arc of the state machine takes in addition");

static char fault_device[48];
module_param_string(fault_device, fault_device, sizeof(fault_device), 0644);
MODULE_PARM_DESC(fault_device, "PCI address or mdev UUID of the only device that faults; empty: all");

static unsigned int fault_arc;
module_param(fault_arc, uint, 0644);
MODULE_PARM_DESC(fault_arc, "Arc that fails with EIO: from << 4 | to, states as in enum vfio_device_mig_state; 0: none");

static bool fault_arc_fatal;
module_param(fault_arc_fatal, bool, 0644);
MODULE_PARM_DESC(fault_arc_fatal, "The failed arc leaves the device in ERROR");

static long fault_read_at = -1;
module_param(fault_read_at, long, 0644);
MODULE_PARM_DESC(fault_read_at, "Offset in a saved state from which reading fails with EIO; -1: none");

static long fault_write_at = -1;
module_param(fault_write_at, long, 0644);
MODULE_PARM_DESC(fault_write_at, "Offset in a resuming state from which writing fails with EIO; -1: none");

struct stream_header {
	__le32 magic;
	__le32 version;
	char kind[16];
	__le32 state_size;
	__le32 padding;
};

struct stream_record {
	__le32 tag;
	__le32 crc;
};

/**
 * struct migration_file - the data file of a saving or a resuming session
 * @lock: taken inside the fixture's state_lock, outside the device's locks.
 * @f: the device; NULL once its session has ended.
 * @data: saving: bytes produced and not read yet, from @pos to @len.
 *	resuming: the image so far without its padding, up to @len.
 * @offset: bytes the user has read or written.
 * @padding: bytes of padding in the image; resuming: 0 before the header.
 * @padded: bytes of it that were produced or taken in.
 * @precopy: the device is in PRE_COPY or PRE_COPY_P2P.
 * @ended: the last record was produced.
 * @bad: the padding is not what it should be.
 * @saved_changes: fixture_ops.changes() at the last STATE record.
 * @crc: of all bytes produced; resuming: of header and padding.
 */
struct migration_file {
	struct file *filp;
	struct mutex lock;
	struct fixture *f;
	u8 *data;
	size_t pos, len, capacity;
	u64 offset;
	u32 padding, padded;
	bool precopy, ended, bad;
	u64 saved_changes;
	u32 crc;
};

bool fixture_is_target(struct fixture *f)
{
	const char *name = dev_name(f->vdev->dev);

	/* A value written by echo ends in a newline. */
	return !fault_device[0] || fault_device[0] == '\n' ||
	       !strncmp(fault_device, name, strlen(name));
}

/* --- the stream ---------------------------------------------------------- */

/* One period of the padding, and the bytes of it from one of its offsets on. */
static u8 *padding_bytes;

static void make_padding(void)
{
	size_t i;

	for (i = 0; i < PADDING_PERIOD; i++)
		padding_bytes[i] = i * 167 + (i >> 8);
}

static const u8 *padding_at(u32 offset, size_t *n)
{
	size_t at = offset % PADDING_PERIOD;

	*n = min(*n, PADDING_PERIOD - at);
	return padding_bytes + at;
}

static int file_reserve(struct migration_file *m, size_t more)
{
	size_t wanted = m->len + more;
	void *data;

	if (wanted <= m->capacity)
		return 0;
	if (wanted > IMAGE_BYTES_MAX)
		return -ENOSPC;
	wanted = roundup_pow_of_two(wanted);
	data = kvmalloc(wanted, GFP_KERNEL_ACCOUNT);
	if (!data)
		return -ENOMEM;
	memcpy(data, m->data, m->len);
	kvfree(m->data);
	m->data = data;
	m->capacity = wanted;
	return 0;
}

static void file_append(struct migration_file *m, const void *bytes, size_t n)
{
	memcpy(m->data + m->len, bytes, n);
	m->crc = crc32_le(m->crc, m->data + m->len, n);
	m->len += n;
}

static int file_append_header(struct migration_file *m)
{
	struct stream_header header = {
		.magic = cpu_to_le32(STREAM_MAGIC),
		.version = cpu_to_le32(STREAM_VERSION),
		.state_size = cpu_to_le32(m->f->ops->state_size),
		.padding = cpu_to_le32(state_padding),
	};
	int ret = file_reserve(m, sizeof(header));

	if (ret)
		return ret;
	strscpy(header.kind, m->f->ops->kind, sizeof(header.kind));
	file_append(m, &header, sizeof(header));
	m->padding = le32_to_cpu(header.padding);
	return 0;
}

static int file_append_padding(struct migration_file *m)
{
	size_t n = m->padding - m->padded;
	const u8 *bytes = padding_at(m->padded, &n);
	int ret = file_reserve(m, n);

	if (ret)
		return ret;
	file_append(m, bytes, n);
	m->padded += n;
	return 0;
}

static int file_append_state(struct migration_file *m)
{
	const struct fixture_ops *ops = m->f->ops;
	struct stream_record record = { .tag = cpu_to_le32(RECORD_STATE) };
	u64 changes = ops->changes ? ops->changes(m->f) : 0;
	void *state = kvzalloc(ops->state_size, GFP_KERNEL_ACCOUNT);
	int ret;

	if (!state)
		return -ENOMEM;
	ret = ops->save(m->f, state);
	if (!ret)
		ret = file_reserve(m, sizeof(record) + ops->state_size);
	if (!ret) {
		record.crc = cpu_to_le32(crc32_le(m->crc, state,
						  ops->state_size));
		file_append(m, &record, sizeof(record));
		file_append(m, state, ops->state_size);
		m->saved_changes = changes;
	}
	kvfree(state);
	return ret;
}

static int file_append_end(struct migration_file *m)
{
	struct stream_record record = {
		.tag = cpu_to_le32(RECORD_END),
		.crc = cpu_to_le32(m->crc),
	};
	int ret = file_reserve(m, sizeof(record));

	if (!ret)
		file_append(m, &record, sizeof(record));
	return ret;
}

static size_t record_size(const struct fixture *f)
{
	return sizeof(struct stream_record) + f->ops->state_size;
}

/*
 * Finds the last state in a whole image. Any defect, including a byte too few
 * or too many, is -EINVAL.
 */
static int image_last_state(const struct migration_file *m, const void **state)
{
	const struct fixture *f = m->f;
	const u8 *data = m->data;
	const struct stream_header *header = (const void *)data;
	size_t len = m->len, at = sizeof(*header), size = f->ops->state_size;
	u32 crc = m->crc;

	*state = NULL;
	if (len < sizeof(*header) ||
	    le32_to_cpu(header->magic) != STREAM_MAGIC ||
	    le32_to_cpu(header->version) != STREAM_VERSION ||
	    le32_to_cpu(header->state_size) != size ||
	    strncmp(header->kind, f->ops->kind, sizeof(header->kind)) ||
	    m->padded != m->padding || m->bad)
		return -EINVAL;

	while (len - at >= sizeof(struct stream_record)) {
		const struct stream_record *record = (const void *)(data + at);
		const u8 *body = data + at + sizeof(*record);

		if (le32_to_cpu(record->tag) == RECORD_END)
			return *state && at + sizeof(*record) == len &&
			       le32_to_cpu(record->crc) == crc ? 0 : -EINVAL;
		if (le32_to_cpu(record->tag) != RECORD_STATE ||
		    len - at < record_size(f) ||
		    le32_to_cpu(record->crc) != crc32_le(crc, body, size))
			return -EINVAL;
		*state = body;
		crc = crc32_le(crc, data + at, record_size(f));
		at += record_size(f);
	}
	return -EINVAL;
}

/* --- the data file ------------------------------------------------------- */

/* Clips @len to where the injected fault lies; -EIO once it is reached. */
static ssize_t clip_to_fault(const struct migration_file *m, long fault_at,
			     size_t len)
{
	if (fault_at < 0 || !fixture_is_target(m->f))
		return len;
	if (m->offset >= fault_at)
		return -EIO;
	return min_t(u64, len, fault_at - m->offset);
}

static bool file_has_newer_state(const struct migration_file *m)
{
	const struct fixture_ops *ops = m->f->ops;

	return ops->changes && ops->changes(m->f) != m->saved_changes;
}

/* Makes up what follows what was read, if anything does now. */
static int file_refill(struct migration_file *m)
{
	int ret;

	m->pos = 0;
	m->len = 0;
	if (m->padded < m->padding)
		return file_append_padding(m);
	if (m->precopy)
		return file_has_newer_state(m) ? file_append_state(m) : 0;
	if (m->ended)
		return 0;
	ret = file_append_state(m);
	if (!ret)
		ret = file_append_end(m);
	m->ended = !ret;
	return ret;
}

static ssize_t file_next_bytes(struct migration_file *m, size_t len)
{
	int ret;

	if (!m->f)
		return -ENODEV;
	if (m->pos == m->len) {
		ret = file_refill(m);
		if (ret)
			return ret;
	}
	if (m->pos == m->len)
		return m->precopy ? -ENOMSG : 0;
	return clip_to_fault(m, fault_read_at, min(len, m->len - m->pos));
}

static ssize_t saving_read(struct file *filp, char __user *buf, size_t len,
			   loff_t *ppos)
{
	struct migration_file *m = filp->private_data;
	ssize_t n;

	if (ppos)
		return -ESPIPE;

	mutex_lock(&m->lock);
	n = file_next_bytes(m, len);
	if (n > 0 && copy_to_user(buf, m->data + m->pos, n))
		n = -EFAULT;
	if (n > 0) {
		m->pos += n;
		m->offset += n;
	}
	mutex_unlock(&m->lock);
	return n;
}

static long saving_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	struct migration_file *m = filp->private_data;
	size_t minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct vfio_precopy_info info;
	u64 pending;
	long ret = 0;

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	if (copy_from_user(&info, (void __user *)arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;

	mutex_lock(&m->lock);
	if (!m->f) {
		ret = -ENODEV;
	} else if (!m->precopy) {
		ret = -EINVAL;
	} else {
		u64 initial_end = sizeof(struct stream_header) + m->padding;

		pending = m->len - m->pos + m->padding - m->padded;
		info.initial_bytes = m->offset < initial_end ?
					     initial_end - m->offset : 0;
		info.dirty_bytes = pending - info.initial_bytes;
		if (file_has_newer_state(m))
			info.dirty_bytes += record_size(m->f);
	}
	mutex_unlock(&m->lock);
	if (!ret && copy_to_user((void __user *)arg, &info, minsz))
		ret = -EFAULT;
	return ret;
}

/* Keeps @n bytes of the image, from @bytes on. */
static int image_keep(struct migration_file *m, const u8 *bytes, size_t n)
{
	int ret = file_reserve(m, n);

	if (ret)
		return ret;
	memcpy(m->data + m->len, bytes, n);
	m->len += n;
	return 0;
}

/* Takes in the next @n bytes of an image: padding is compared, and not kept. */
static int image_take(struct migration_file *m, const u8 *bytes, size_t n)
{
	size_t header = sizeof(struct stream_header), part;
	const u8 *expected;
	int ret;

	if (m->len < header) {
		part = min(n, header - m->len);
		ret = image_keep(m, bytes, part);
		if (ret)
			return ret;
		bytes += part;
		n -= part;
		if (m->len < header)
			return 0;
		m->padding = le32_to_cpu(((struct stream_header *)m->data)->padding);
		m->crc = crc32_le(0, m->data, header);
	}
	while (n && m->padded < m->padding) {
		part = min_t(size_t, n, m->padding - m->padded);
		expected = padding_at(m->padded, &part);
		m->bad |= memcmp(bytes, expected, part) != 0;
		m->crc = crc32_le(m->crc, bytes, part);
		m->padded += part;
		bytes += part;
		n -= part;
	}
	return n ? image_keep(m, bytes, n) : 0;
}

static ssize_t resuming_write(struct file *filp, const char __user *buf,
			      size_t len, loff_t *ppos)
{
	struct migration_file *m = filp->private_data;
	ssize_t n;

	if (ppos)
		return -ESPIPE;

	mutex_lock(&m->lock);
	n = m->f ? clip_to_fault(m, fault_write_at, len) : -ENODEV;
	if (n > 0) {
		u8 *bytes;

		n = min_t(size_t, n, PADDING_PERIOD);
		bytes = vmemdup_user(buf, n);
		if (IS_ERR(bytes)) {
			n = PTR_ERR(bytes);
		} else {
			int ret = image_take(m, bytes, n);

			kvfree(bytes);
			n = ret ?: n;
		}
	}
	if (n > 0)
		m->offset += n;
	mutex_unlock(&m->lock);
	return n;
}

static int file_release(struct inode *inode, struct file *filp)
{
	struct migration_file *m = filp->private_data;

	mutex_destroy(&m->lock);
	kvfree(m->data);
	kfree(m);
	return 0;
}

static const struct file_operations saving_fops = {
	.owner = THIS_MODULE,
	.read = saving_read,
	.unlocked_ioctl = saving_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = file_release,
};

static const struct file_operations resuming_fops = {
	.owner = THIS_MODULE,
	.write = resuming_write,
	.release = file_release,
};

/* The caller gets one reference to the file, and the session keeps another. */
static struct migration_file *file_open(struct fixture *f, bool saving)
{
	struct migration_file *m = kzalloc(sizeof(*m), GFP_KERNEL_ACCOUNT);

	if (!m)
		return ERR_PTR(-ENOMEM);
	mutex_init(&m->lock);
	m->f = f;
	m->filp = anon_inode_getfile("vfio_fixture_migration",
				     saving ? &saving_fops : &resuming_fops, m,
				     saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(m->filp)) {
		int ret = PTR_ERR(m->filp);

		kfree(m);
		return ERR_PTR(ret);
	}
	stream_open(m->filp->f_inode, m->filp);
	get_file(m->filp);
	return m;
}

/* Ends a session: what the user may still hold of it answers ENODEV. */
static void file_close(struct migration_file **session)
{
	struct migration_file *m = *session;

	if (!m)
		return;
	mutex_lock(&m->lock);
	m->f = NULL;
	mutex_unlock(&m->lock);
	fput(m->filp);
	*session = NULL;
}

/* --- the state machine --------------------------------------------------- */

static struct file *begin_saving(struct fixture *f)
{
	struct migration_file *m = file_open(f, true);
	int ret;

	if (IS_ERR(m))
		return ERR_CAST(m);
	m->precopy = true;
	ret = file_append_header(m);
	if (ret) {
		fput(m->filp);
		file_close(&m);
		return ERR_PTR(ret);
	}
	f->saving = m;
	return m->filp;
}

/* The last state is made when its turn to be read comes: the device is stopped. */
static void finish_saving(struct fixture *f)
{
	struct migration_file *m = f->saving;

	mutex_lock(&m->lock);
	m->precopy = false;
	mutex_unlock(&m->lock);
}

static struct file *save_all(struct fixture *f)
{
	struct file *filp = begin_saving(f);

	if (!IS_ERR(filp))
		finish_saving(f);
	return filp;
}

static struct file *begin_resuming(struct fixture *f)
{
	struct migration_file *m = file_open(f, false);

	if (IS_ERR(m))
		return ERR_CAST(m);
	f->resuming = m;
	return m->filp;
}

/* On failure the device stays in RESUMING, which only a reset leaves. */
static int finish_resuming(struct fixture *f)
{
	struct migration_file *m = f->resuming;
	const void *state;
	int ret;

	mutex_lock(&m->lock);
	ret = image_last_state(m, &state);
	if (!ret)
		ret = f->ops->load(f, state);
	mutex_unlock(&m->lock);
	if (!ret)
		file_close(&f->resuming);
	return ret;
}

#define ARC(from, to) \
	(VFIO_DEVICE_STATE_##from << 4 | VFIO_DEVICE_STATE_##to)

/* One arc of the state machine. Returns the data file of a new session. */
static struct file *step(struct fixture *f, enum vfio_device_mig_state next)
{
	unsigned int arc = f->state << 4 | next;
	int ret;

	if (arc_delay_ms)
		msleep(arc_delay_ms);
	if (fault_arc == arc && fixture_is_target(f)) {
		if (fault_arc_fatal) {
			f->ops->set_dma(f, false);
			f->state = VFIO_DEVICE_STATE_ERROR;
		}
		return ERR_PTR(-EIO);
	}

	switch (arc) {
	case ARC(RUNNING, RUNNING_P2P):
	case ARC(RUNNING, STOP):
	case ARC(PRE_COPY, PRE_COPY_P2P):
		return ERR_PTR(f->ops->set_dma(f, false));
	case ARC(RUNNING_P2P, RUNNING):
	case ARC(STOP, RUNNING):
	case ARC(PRE_COPY_P2P, PRE_COPY):
		return ERR_PTR(f->ops->set_dma(f, true));
	case ARC(RUNNING_P2P, STOP):
	case ARC(STOP, RUNNING_P2P):
		return NULL;
	case ARC(RUNNING, PRE_COPY):
	case ARC(RUNNING_P2P, PRE_COPY_P2P):
		return begin_saving(f);
	case ARC(PRE_COPY, STOP_COPY):
		ret = f->ops->set_dma(f, false);
		if (!ret)
			finish_saving(f);
		return ERR_PTR(ret);
	case ARC(PRE_COPY_P2P, STOP_COPY):
		finish_saving(f);
		return NULL;
	case ARC(STOP, STOP_COPY):
		return save_all(f);
	case ARC(PRE_COPY, RUNNING):
	case ARC(PRE_COPY_P2P, RUNNING_P2P):
	case ARC(STOP_COPY, STOP):
		file_close(&f->saving);
		return NULL;
	case ARC(STOP, RESUMING):
		return begin_resuming(f);
	case ARC(RESUMING, STOP):
		return ERR_PTR(finish_resuming(f));
	}
	return ERR_PTR(-EINVAL);
}

/*
 * What leads nowhere, but makes vfio_mig_get_next_state() of kernels so far go
 * round for ever (the first) or complain (the second).
 */
static bool is_trap(enum vfio_device_mig_state from,
		    enum vfio_device_mig_state to)
{
	return (from == VFIO_DEVICE_STATE_STOP_COPY &&
		(to == VFIO_DEVICE_STATE_PRE_COPY ||
		 to == VFIO_DEVICE_STATE_PRE_COPY_P2P)) ||
	       from == VFIO_DEVICE_STATE_ERROR;
}

struct file *fixture_set_state(struct fixture *f,
			       enum vfio_device_mig_state state)
{
	enum vfio_device_mig_state next;
	struct file *filp = NULL;
	int ret;

	mutex_lock(&f->state_lock);
	if (is_trap(f->state, state))
		filp = ERR_PTR(-EINVAL);

	while (!IS_ERR(filp) && state != f->state) {
		ret = vfio_mig_get_next_state(f->vdev, f->state, state, &next);
		filp = ret ? ERR_PTR(ret) : step(f, next);
		if (IS_ERR(filp))
			break;
		f->state = next;
	}
	mutex_unlock(&f->state_lock);
	return filp;
}
EXPORT_SYMBOL_GPL(fixture_set_state);

int fixture_get_state(struct fixture *f, enum vfio_device_mig_state *state)
{
	mutex_lock(&f->state_lock);
	*state = f->state;
	mutex_unlock(&f->state_lock);
	return 0;
}
EXPORT_SYMBOL_GPL(fixture_get_state);

int fixture_data_size(struct fixture *f, unsigned long *bytes)
{
	*bytes = sizeof(struct stream_header) + state_padding +
		 record_size(f) + sizeof(struct stream_record);
	return 0;
}
EXPORT_SYMBOL_GPL(fixture_data_size);

/* --- the device's life --------------------------------------------------- */

void fixture_init(struct fixture *f, struct vfio_device *vdev,
		  const struct fixture_ops *ops)
{
	f->vdev = vdev;
	f->ops = ops;
	mutex_init(&f->state_lock);
	fixture_log_init(&f->log);
}
EXPORT_SYMBOL_GPL(fixture_init);

void fixture_open(struct fixture *f)
{
	f->state = VFIO_DEVICE_STATE_RUNNING;
	f->ops->set_dma(f, true);
}
EXPORT_SYMBOL_GPL(fixture_open);

static void end_sessions(struct fixture *f)
{
	file_close(&f->saving);
	file_close(&f->resuming);
}

void fixture_close(struct fixture *f)
{
	mutex_lock(&f->state_lock);
	f->ops->set_dma(f, false);
	end_sessions(f);
	mutex_unlock(&f->state_lock);
	fixture_log_stop(f);
}
EXPORT_SYMBOL_GPL(fixture_close);

/* The log goes on: a reset device writes nothing, but what it wrote is dirty. */
void fixture_reset(struct fixture *f)
{
	mutex_lock(&f->state_lock);
	f->ops->set_dma(f, false);
	end_sessions(f);
	f->ops->reset(f);
	f->state = VFIO_DEVICE_STATE_RUNNING;
	f->ops->set_dma(f, true);
	mutex_unlock(&f->state_lock);
}
EXPORT_SYMBOL_GPL(fixture_reset);

static int __init fixture_module_init(void)
{
	padding_bytes = kvmalloc(PADDING_PERIOD, GFP_KERNEL);
	if (!padding_bytes)
		return -ENOMEM;
	make_padding();
	return 0;
}

static void __exit fixture_module_exit(void)
{
	kvfree(padding_bytes);
}

module_init(fixture_module_init);
module_exit(fixture_module_exit);

MODULE_DESCRIPTION("What the VFIO devices of the test bed have in common");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS(IOMMUFD);

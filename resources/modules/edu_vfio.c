// SPDX-License-Identifier: GPL-2.0-only
/*
 * edu_vfio - a vfio-pci variant driver for QEMU's `edu` device, 1234:11e8.
 *
 * edu has a DMA engine that copies between memory and a buffer of its own, so
 * it does real DMA through a real IOMMU. This driver sees every write to its
 * registers (they cannot be mapped), logs the DMA and migrates the device: see
 * vfio_fixture.h.
 *
 * edu performs a DMA some 100 ms after it was told to, and clears CMD's RUN
 * bit then. Until that bit is clear the pages stay dirty, however often they
 * are reported; and the device is not P2P-quiescent, so the arcs that stop its
 * DMA wait.
 *
 * What migrates: the registers, and the buffer. Only a DMA reaches the buffer,
 * so the stopped device is made to copy it to, or from, a page of our own that
 * is mapped for that time at an IOVA the user does not use. What does not
 * migrate: CMD but for RUN, which is clear in a stopped device.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/iommu.h>
#include <linux/iopoll.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/uaccess.h>
#include <linux/vfio_pci_core.h>

#include "vfio_fixture.h"

#define EDU_LIVENESS		0x04	/* reads as the complement of what was written */
#define EDU_FACTORIAL		0x08	/* reads as n! once n was written */
#define EDU_STATUS		0x20
#define   EDU_STATUS_COMPUTING	  0x01
#define EDU_IRQ_STATUS		0x24
#define EDU_IRQ_RAISE		0x60
#define EDU_IRQ_ACK		0x64
#define EDU_DMA_SRC		0x80
#define EDU_DMA_DST		0x88
#define EDU_DMA_COUNT		0x90
#define EDU_DMA_CMD		0x98
#define   EDU_DMA_RUN		  0x1
#define   EDU_DMA_TO_MEMORY	  0x2

/*
 * Where the buffer appears in EDU_DMA_SRC or EDU_DMA_DST. It has one byte more,
 * but QEMU takes a DMA that includes that byte for one out of bounds.
 */
#define EDU_BUFFER		0x40000
#define EDU_BUFFER_BYTES	4095

#define QUIESCE_POLL_US		2000
#define QUIESCE_TIMEOUT_US	(2 * USEC_PER_SEC)

static unsigned int mig_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
				VFIO_MIGRATION_PRE_COPY;
module_param(mig_flags, uint, 0644);
MODULE_PARM_DESC(mig_flags, "Migration flags of a device opened from now on; 0: it does not migrate");

static bool log_ops = true;
module_param(log_ops, bool, 0644);
MODULE_PARM_DESC(log_ops, "A device opened from now on can log its DMA");

/**
 * struct edu
 * @lock: what follows and the device's registers; taken outside
 *	core.memory_lock and the fixture's log.
 * @dma_allowed: the migration state lets the device start DMA.
 * @factorial_input: what was last written to EDU_FACTORIAL, as that register
 *	reads as something else.
 */
struct edu {
	struct vfio_pci_core_device core;
	struct fixture fixture;
	struct mutex lock;
	bool dma_allowed;
	bool factorial_written;
	u32 factorial_input;
};

struct edu_state {
	__le32 liveness;
	__le32 factorial_written;
	__le32 factorial_input;
	__le32 status;
	__le32 irq_status;
	__le32 reserved;
	__le64 dma_src;
	__le64 dma_dst;
	__le64 dma_count;
	u8 buffer[EDU_BUFFER_BYTES];
};

static struct edu *to_edu(struct vfio_device *vdev)
{
	return container_of(vdev, struct edu, core.vdev);
}

static struct edu *from_fixture(struct fixture *f)
{
	return container_of(f, struct edu, fixture);
}

static struct fixture *to_fixture(struct vfio_device *vdev)
{
	return &to_edu(vdev)->fixture;
}

static void __iomem *reg(struct edu *e, unsigned int offset)
{
	return e->core.barmap[0] + offset;
}

/*
 * Registers answer, and with PCI_COMMAND_MASTER the device reaches memory, from
 * here to bus_release(), whatever the user has set in the command register.
 */
static u16 bus_claim(struct edu *e, u16 enable)
{
	u16 command;

	down_write(&e->core.memory_lock);
	pci_read_config_word(e->core.pdev, PCI_COMMAND, &command);
	pci_write_config_word(e->core.pdev, PCI_COMMAND, command | enable);
	return command;
}

static void bus_release(struct edu *e, u16 command)
{
	pci_write_config_word(e->core.pdev, PCI_COMMAND, command);
	up_write(&e->core.memory_lock);
}

/* Waits until the device neither does DMA nor computes. The bus is claimed. */
static int wait_until_idle(struct edu *e)
{
	u64 cmd;
	u32 status;
	int ret;

	ret = read_poll_timeout(readq, cmd, !(cmd & EDU_DMA_RUN),
				QUIESCE_POLL_US, QUIESCE_TIMEOUT_US, false,
				reg(e, EDU_DMA_CMD));
	if (ret)
		return ret;
	return read_poll_timeout(readl, status,
				 !(status & EDU_STATUS_COMPUTING),
				 QUIESCE_POLL_US, QUIESCE_TIMEOUT_US, false,
				 reg(e, EDU_STATUS));
}

/* --- the buffer ---------------------------------------------------------- */

/* An IOVA, from the aperture's end downwards, where the user maps nothing. */
static int find_free_iova(struct iommu_domain *domain, unsigned long *iova)
{
	unsigned long at = domain->geometry.aperture_end & PAGE_MASK;
	int tries;

	for (tries = 0; tries < 64; tries++, at -= PAGE_SIZE) {
		if (!iommu_iova_to_phys(domain, at)) {
			*iova = at;
			return 0;
		}
	}
	return -ENOSPC;
}

static int run_dma(struct edu *e, u64 src, u64 dst, u64 direction)
{
	writeq(src, reg(e, EDU_DMA_SRC));
	writeq(dst, reg(e, EDU_DMA_DST));
	writeq(EDU_BUFFER_BYTES, reg(e, EDU_DMA_COUNT));
	writeq(EDU_DMA_RUN | direction, reg(e, EDU_DMA_CMD));
	return wait_until_idle(e);
}

/*
 * Copies the buffer out, or in. The bus is claimed, the device idle; its DMA
 * registers change. ENODEV without an I/O address space to do it in.
 */
static int copy_buffer(struct edu *e, void *to, const void *from)
{
	struct iommu_domain *domain =
		iommu_get_domain_for_dev(&e->core.pdev->dev);
	unsigned long iova;
	void *page;
	int ret;

	if (!domain || !(domain->type & __IOMMU_DOMAIN_PAGING))
		return -ENODEV;
	ret = find_free_iova(domain, &iova);
	if (ret)
		return ret;
	page = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	if (!page)
		return -ENOMEM;
	ret = iommu_map(domain, iova, virt_to_phys(page), PAGE_SIZE,
			IOMMU_READ | IOMMU_WRITE, GFP_KERNEL);
	if (ret)
		goto free;

	if (from) {
		memcpy(page, from, EDU_BUFFER_BYTES);
		ret = run_dma(e, iova, EDU_BUFFER, 0);
	} else {
		ret = run_dma(e, EDU_BUFFER, iova, EDU_DMA_TO_MEMORY);
		memcpy(to, page, EDU_BUFFER_BYTES);
	}
	iommu_unmap(domain, iova, PAGE_SIZE);
free:
	free_page((unsigned long)page);
	return ret;
}

/* --- migration ----------------------------------------------------------- */

static int edu_set_dma(struct fixture *f, bool allowed)
{
	struct edu *e = from_fixture(f);
	u16 command;
	int ret = 0;

	mutex_lock(&e->lock);
	if (!allowed) {
		command = bus_claim(e, PCI_COMMAND_MEMORY);
		ret = wait_until_idle(e);
		bus_release(e, command);
		if (!ret)
			fixture_log_release(f);
	}
	if (!ret)
		e->dma_allowed = allowed;
	mutex_unlock(&e->lock);
	return ret;
}

static void save_registers(struct edu *e, struct edu_state *state)
{
	state->liveness = cpu_to_le32(readl(reg(e, EDU_LIVENESS)));
	state->factorial_written = cpu_to_le32(e->factorial_written);
	state->factorial_input = cpu_to_le32(e->factorial_input);
	state->status = cpu_to_le32(readl(reg(e, EDU_STATUS)));
	state->irq_status = cpu_to_le32(readl(reg(e, EDU_IRQ_STATUS)));
	state->dma_src = cpu_to_le64(readq(reg(e, EDU_DMA_SRC)));
	state->dma_dst = cpu_to_le64(readq(reg(e, EDU_DMA_DST)));
	state->dma_count = cpu_to_le64(readq(reg(e, EDU_DMA_COUNT)));
}

static void load_dma_registers(struct edu *e, const struct edu_state *state)
{
	writeq(le64_to_cpu(state->dma_src), reg(e, EDU_DMA_SRC));
	writeq(le64_to_cpu(state->dma_dst), reg(e, EDU_DMA_DST));
	writeq(le64_to_cpu(state->dma_count), reg(e, EDU_DMA_COUNT));
}

static int load_registers(struct edu *e, const struct edu_state *state)
{
	int ret = 0;

	writel(~le32_to_cpu(state->liveness), reg(e, EDU_LIVENESS));
	/* Compute first, without the interrupt that STATUS may ask for. */
	writel(0, reg(e, EDU_STATUS));
	e->factorial_written = le32_to_cpu(state->factorial_written);
	e->factorial_input = le32_to_cpu(state->factorial_input);
	if (e->factorial_written) {
		writel(e->factorial_input, reg(e, EDU_FACTORIAL));
		ret = wait_until_idle(e);
	}
	writel(le32_to_cpu(state->status), reg(e, EDU_STATUS));
	writel(U32_MAX, reg(e, EDU_IRQ_ACK));
	/* An interrupt that was pending is pending again. */
	if (state->irq_status)
		writel(le32_to_cpu(state->irq_status), reg(e, EDU_IRQ_RAISE));
	load_dma_registers(e, state);
	return ret;
}

static int edu_save(struct fixture *f, void *data)
{
	struct edu *e = from_fixture(f);
	struct edu_state *state = data;
	u16 command;
	int ret;

	mutex_lock(&e->lock);
	command = bus_claim(e, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	save_registers(e, state);
	ret = copy_buffer(e, state->buffer, NULL);
	load_dma_registers(e, state);
	bus_release(e, command);
	mutex_unlock(&e->lock);
	return ret;
}

static int edu_load(struct fixture *f, const void *data)
{
	struct edu *e = from_fixture(f);
	const struct edu_state *state = data;
	u16 command;
	int ret;

	mutex_lock(&e->lock);
	command = bus_claim(e, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	ret = copy_buffer(e, NULL, state->buffer);
	if (!ret)
		ret = load_registers(e, state);
	bus_release(e, command);
	mutex_unlock(&e->lock);
	return ret;
}

/*
 * The buffer keeps its content where no I/O address space is attached. The
 * factorial cannot be 0 again, and so is that of 0: it depends on nothing that
 * was before, and moves.
 */
static void edu_reset(struct fixture *f)
{
	static const struct edu_state zero = {
		.factorial_written = cpu_to_le32(1),
	};
	struct edu *e = from_fixture(f);
	u16 command;

	mutex_lock(&e->lock);
	command = bus_claim(e, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	copy_buffer(e, NULL, zero.buffer);
	load_registers(e, &zero);
	bus_release(e, command);
	mutex_unlock(&e->lock);
}

/* Ends the hold on pages whose DMA is over. Unreadable registers read as RUN. */
static void edu_settle(struct fixture *f)
{
	struct edu *e = from_fixture(f);

	mutex_lock(&e->lock);
	down_read(&e->core.memory_lock);
	if (!(readq(reg(e, EDU_DMA_CMD)) & EDU_DMA_RUN))
		fixture_log_release(f);
	up_read(&e->core.memory_lock);
	mutex_unlock(&e->lock);
}

static const struct fixture_ops edu_fixture_ops = {
	.kind = "edu",
	.state_size = sizeof(struct edu_state),
	.set_dma = edu_set_dma,
	.save = edu_save,
	.load = edu_load,
	.reset = edu_reset,
	.settle = edu_settle,
};

FIXTURE_VFIO_OPS(edu, to_fixture);

/* --- register writes ----------------------------------------------------- */

static bool in_buffer(u64 at, u64 count)
{
	return at >= EDU_BUFFER && count <= EDU_BUFFER_BYTES &&
	       at - EDU_BUFFER <= EDU_BUFFER_BYTES - count;
}

/* Before a DMA starts. Some QEMUs exit when one leaves the buffer: refuse it. */
static int before_dma(struct edu *e, u64 cmd)
{
	u64 src = readq(reg(e, EDU_DMA_SRC));
	u64 dst = readq(reg(e, EDU_DMA_DST));
	u64 count = readq(reg(e, EDU_DMA_COUNT));
	bool to_memory = cmd & EDU_DMA_TO_MEMORY;

	/* The device ignores a command while it executes one. */
	if (readq(reg(e, EDU_DMA_CMD)) & EDU_DMA_RUN)
		return 0;
	if (!e->dma_allowed)
		return -EBUSY;
	if (!count || !in_buffer(to_memory ? src : dst, count))
		return -EINVAL;
	if (to_memory)
		fixture_log_hold(&e->fixture, dst, count);
	return 0;
}

static int before_write(struct edu *e, u64 offset, u64 value)
{
	if (offset == EDU_DMA_CMD && (value & EDU_DMA_RUN))
		return before_dma(e, value);
	if (offset == EDU_FACTORIAL &&
	    !(readl(reg(e, EDU_STATUS)) & EDU_STATUS_COMPUTING)) {
		e->factorial_written = true;
		e->factorial_input = value;
	}
	return 0;
}

static ssize_t edu_write(struct vfio_device *vdev, const char __user *buf,
			 size_t n, loff_t *pos)
{
	struct edu *e = to_edu(vdev);
	u64 offset = *pos & VFIO_PCI_OFFSET_MASK;
	u64 value = 0;
	ssize_t ret;

	if (VFIO_PCI_OFFSET_TO_INDEX(*pos) != VFIO_PCI_BAR0_REGION_INDEX)
		return vfio_pci_core_write(vdev, buf, n, pos);
	/* One register at a time. */
	if ((n != 4 && n != 8) || offset % n)
		return -EINVAL;
	if (copy_from_user(&value, buf, n))
		return -EFAULT;

	mutex_lock(&e->lock);
	ret = before_write(e, offset, value);
	if (!ret)
		ret = vfio_pci_core_write(vdev, buf, n, pos);
	mutex_unlock(&e->lock);
	return ret;
}

/* --- the device's life --------------------------------------------------- */

static long edu_get_info(struct vfio_device *vdev, unsigned long arg)
{
	struct vfio_device_info __user *info = (void __user *)arg;
	long ret = vfio_pci_core_ioctl(vdev, VFIO_DEVICE_GET_INFO, arg);
	u32 flags;

	if (ret)
		return ret;
	if (get_user(flags, &info->flags) ||
	    put_user(flags | VFIO_DEVICE_FLAGS_RESET, &info->flags))
		return -EFAULT;
	return 0;
}

static long edu_ioctl(struct vfio_device *vdev, unsigned int cmd,
		      unsigned long arg)
{
	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return edu_get_info(vdev, arg);
	case VFIO_DEVICE_RESET:
		fixture_reset(to_fixture(vdev));
		return 0;
	case VFIO_DEVICE_IOEVENTFD:
		/* It would ring doorbells past us. */
		return -ENOTTY;
	}
	return vfio_pci_core_ioctl(vdev, cmd, arg);
}

static int edu_init(struct vfio_device *vdev)
{
	struct edu *e = to_edu(vdev);

	mutex_init(&e->lock);
	fixture_init(&e->fixture, vdev, &edu_fixture_ops);
	return vfio_pci_core_init_dev(vdev);
}

static int edu_open(struct vfio_device *vdev)
{
	struct edu *e = to_edu(vdev);
	int ret = vfio_pci_core_enable(&e->core);

	if (ret)
		return ret;
	ret = vfio_pci_core_setup_barmap(&e->core, VFIO_PCI_BAR0_REGION_INDEX);
	if (ret) {
		vfio_pci_core_disable(&e->core);
		return ret;
	}
	vdev->migration_flags = mig_flags;
	vdev->mig_ops = mig_flags ? &edu_migration_ops : NULL;
	vdev->log_ops = log_ops ? &edu_log_ops : NULL;
	vfio_pci_core_finish_enable(&e->core);
	/* Every doorbell must come to us. */
	e->core.bar_mmap_supported[VFIO_PCI_BAR0_REGION_INDEX] = false;
	fixture_open(&e->fixture);
	return 0;
}

static void edu_close(struct vfio_device *vdev)
{
	fixture_close(to_fixture(vdev));
	vfio_pci_core_close_device(vdev);
}

static const struct vfio_device_ops edu_ops = {
	.name = "edu_vfio",
	.init = edu_init,
	.release = vfio_pci_core_release_dev,
	.open_device = edu_open,
	.close_device = edu_close,
	.ioctl = edu_ioctl,
	.device_feature = vfio_pci_core_ioctl_feature,
	.read = vfio_pci_core_read,
	.write = edu_write,
	.mmap = vfio_pci_core_mmap,
	.request = vfio_pci_core_request,
	.match = vfio_pci_core_match,
	.bind_iommufd = vfio_iommufd_physical_bind,
	.unbind_iommufd = vfio_iommufd_physical_unbind,
	.attach_ioas = vfio_iommufd_physical_attach_ioas,
	.detach_ioas = vfio_iommufd_physical_detach_ioas,
};

static int edu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct edu *e;
	int ret;

	e = vfio_alloc_device(edu, core.vdev, &pdev->dev, &edu_ops);
	if (IS_ERR(e))
		return PTR_ERR(e);
	dev_set_drvdata(&pdev->dev, &e->core);
	ret = vfio_pci_core_register_device(&e->core);
	if (ret)
		vfio_put_device(&e->core.vdev);
	return ret;
}

static void edu_remove(struct pci_dev *pdev)
{
	struct vfio_pci_core_device *core = dev_get_drvdata(&pdev->dev);

	vfio_pci_core_unregister_device(core);
	vfio_put_device(&core->vdev);
}

static const struct pci_device_id edu_ids[] = {
	{ PCI_DRIVER_OVERRIDE_DEVICE_VFIO(0x1234, 0x11e8) },
	{}
};
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "edu_vfio",
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
	.err_handler = &vfio_pci_core_err_handlers,
	.driver_managed_dma = true,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("vfio-pci variant driver for QEMU's edu device");
MODULE_LICENSE("GPL");

//! How the disks of machines are looked into.

use std::ffi::OsString;

use clap::Args;

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Inside the disks of machines")]
pub(crate) struct Inside {
    /// Open encrypted volumes (LUKS) with this key file; VOLUME, a name such as vda2 or a UUID, says which one it is for
    /// (can be repeated)
    #[arg(long, value_name = "[VOLUME=]FILE")]
    pub volume_key_file: Vec<OsString>,
    /// Ask for the passphrase of the encrypted volumes
    #[arg(long)]
    pub ask_volume_passphrase: bool,
    /// Parse file systems in this process, not in one without powers: for images that you trust, where that cannot be
    #[arg(long)]
    pub unconfined: bool,
}

/// The same, for whoever looks at files.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Inside the disks of machines")]
pub(crate) struct Within {
    #[command(flatten)]
    pub inside: Inside,
    /// Have the kernel mount what no reader here knows, read-only and where nobody else sees it. Its parsers are not
    /// confined: only for images that you trust, and as root
    #[arg(long)]
    pub kernel_mount: bool,
}

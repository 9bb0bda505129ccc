//! Newer files put on the disks of a machine that were just written from its image, so that it starts as it was when its
//! agent last looked: by the kernel, through loop devices that nobody else sees.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{
    Blocks, Captured, Clock, Code, Error, ItemPath, Kind, Next, Progress, Receipt, Result, Skip, SkipReason,
    Source, StreamReader,
};
use mainstay_diskimage::FileBlocks;
use mainstay_nbd::WritableBlocks;
use mainstay_repository::{Entry, PointInfo, PointReader, Repository};
use mainstay_workloads::files::{Changes, Existing as _, LeftOut, OwnerRule, Place, RestoreMode, Restored};
use mainstay_workloads::vm::Overwrite;

use super::disks::ImageFormat;
use super::inside::Inside;
use super::mounted::Mounted;
use super::private::with_own_mounts;
use super::restore::{MachinePlan, machine_disks};
use super::timeline::untold;
use super::tree::Tree;
use crate::restore::{Placing, RestoreRequest, plan_restore, restore};
use crate::view::{PointView, Seen, SeenWalk};

/// Newer files of a machine, for disks that are written from its image.
#[derive(Clone, Copy)]
pub struct Newer<'a> {
    pub repository: &'a Repository,
    /// Their points, lowest first; there may be none.
    pub files: &'a [PointInfo],
    pub inside: Inside<'a>,
    /// A directory to mount below.
    pub scratch: &'a Path,
    pub clock: &'a Arc<dyn Clock>,
}

/// A disk that was written.
#[derive(Clone)]
pub enum WrittenDisk {
    /// A raw image file, or a device.
    Raw(PathBuf),
    /// Anything else.
    Blocks(Arc<dyn WritableBlocks>),
}

/// What [`Newer::apply`] did.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    pub changes: Changes,
    /// Content bytes that were written.
    pub bytes: u64,
    /// What could not be put on the disks, or was not in the points.
    pub skips: Vec<Skip>,
    pub damaged: u64,
    pub took: Duration,
}

/// Whether files can be put on disks here.
fn check_mounting() -> Result<()> {
    let refuse = |why: &str| {
        let what = format!("newer files cannot be put on the restored disks: {why}");
        Error::new(Code::Unsupported, what).hint(ALTERNATIVE)
    };
    if !rustix::process::geteuid().is_root() {
        return Err(refuse("that takes root, who may mount them"));
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err(refuse("this machine has no loop devices"));
    }
    Ok(())
}

const ALTERNATIVE: &str = "--image-only restores the image as it is; its newer files can be restored inside the machine \
                           once it runs, from their own points";

impl Newer<'_> {
    /// Whether the files can be put on disks that are written from `image`: those of `plan`, or all of them.
    ///
    /// Errors: [`Code::Unsupported`], saying what to do instead; those of the repository.
    pub fn check(&self, image: &PointReader, plan: Option<&MachinePlan>) -> Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        check_mounting()?;
        let entries = machine_disks(image)?;
        if plan.is_some_and(|plan| plan.disks().count() < entries.len()) {
            let what = "newer files can only be put on all disks of the machine together";
            return Err(Error::new(Code::Unsupported, what).hint(ALTERNATIVE));
        }
        let open = |entry: &Entry| image.blocks(entry).map(Arc::from);
        let disks: Vec<Arc<dyn Blocks>> = entries.iter().map(open).collect::<Result<_>>()?;
        tree(&disks, &self.inside).map(|_tree| ())
    }

    /// Puts files on the disks, all of the machine in the order of their names, and takes away what the points no longer
    /// have where they looked. Files that are as they were when the image was taken stay untouched.
    ///
    /// What cannot be put where it belongs is skipped and listed. Errors: [`Code::Unsupported`] when the machine's root
    /// cannot be found or mounted: then nothing was changed. Whatever would meet every file.
    pub fn apply(&self, disks: &[WrittenDisk], progress: &Arc<dyn Progress>) -> Result<Applied> {
        let mut applied = Applied::default();
        if self.files.is_empty() {
            return Ok(applied);
        }
        check_mounting()?;
        let began = self.clock.monotonic();
        let opened: Vec<_> = disks.iter().map(WrittenDisk::open).collect::<Result<_>>()?;
        let tree = tree(&opened, &self.inside)?;
        let mut layers = Vec::new();
        for point in self.files {
            let reader = self.repository.read(&point.id)?;
            match LeftOut::parse(&reader.info().position.0) {
                Some(captured) => layers.push((reader, captured)),
                None => applied.skip(ItemPath::root(), untold(point)),
            }
        }
        let (repository, clock, scratch) = (self.repository, self.clock, self.scratch);
        let mut done = with_own_mounts(|| {
            let (mounted, hidden) = mount(&tree, disks, scratch, &layers)?;
            for (reader, _) in &layers {
                let view = Reachable { inner: reader.clone(), hidden: Arc::clone(&hidden) };
                if let Err(error) = applied.put(repository, &view, &mounted.root, clock, progress) {
                    match error.code() {
                        Code::Refused => applied.skip(ItemPath::root(), error.chain().join(": ")),
                        _ => return Err(error),
                    }
                }
            }
            mounted.finish()?;
            Ok(applied)
        })?;
        disks.iter().try_for_each(WrittenDisk::sync)?;
        done.took = self.clock.monotonic().saturating_sub(began);
        Ok(done)
    }

    /// [`Self::apply`] to what a plan has written.
    pub fn apply_to(&self, plan: &MachinePlan, progress: &Arc<dyn Progress>) -> Result<Applied> {
        let (mut disks, mut images) = (Vec::new(), Vec::new());
        for goal in plan.disks() {
            if self.files.is_empty() || goal.format == ImageFormat::Raw {
                disks.push(WrittenDisk::Raw(goal.path.clone()));
                continue;
            }
            let image = Arc::new(Overwrite::open(&goal.path, goal.format.name(), self.scratch)?);
            disks.push(WrittenDisk::Blocks(Arc::<Overwrite>::clone(&image)));
            images.push(image);
        }
        let applied = self.apply(&disks, progress)?;
        drop(disks);
        images.into_iter().try_for_each(|image| Overwrite::close(sole(image)?))?;
        Ok(applied)
    }
}

/// What nobody else uses any more.
pub(super) fn sole<T>(shared: Arc<T>) -> Result<T> {
    Arc::into_inner(shared).ok_or_else(|| Error::bug("a disk is still in use after it was written"))
}

impl WrittenDisk {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(match self {
            Self::Raw(path) => Arc::new(FileBlocks::open(path)?),
            Self::Blocks(blocks) => Arc::<dyn WritableBlocks>::clone(blocks),
        })
    }

    fn sync(&self) -> Result<()> {
        match self {
            Self::Raw(path) => {
                let synced = std::fs::OpenOptions::new().write(true).open(path);
                let synced = synced.and_then(|file| file.sync_all());
                synced.map_err(|error| Error::io(format!("cannot make {} durable", path.display()), error))
            }
            Self::Blocks(blocks) => blocks.flush(),
        }
    }
}

/// What lies on the disks.
fn tree(disks: &[Arc<dyn Blocks>], inside: &Inside<'_>) -> Result<Tree> {
    let tree = Tree::of(disks, inside)?;
    if !tree.has_root() {
        let why = tree.notes.join("; ");
        let what = format!("nothing on the restored disks can be told to be the machine's root: {why}");
        return Err(Error::new(Code::Unsupported, what).hint(ALTERNATIVE));
    }
    Ok(tree)
}

/// Mounts what the points have to do with, and says what cannot be reached.
fn mount(
    tree: &Tree,
    disks: &[WrittenDisk],
    scratch: &Path,
    layers: &[(PointReader, LeftOut)],
) -> Result<(Mounted, Arc<BTreeMap<ItemPath, String>>)> {
    let roots: Vec<&ItemPath> =
        layers.iter().flat_map(|(_, captured)| captured.roots.iter().map(|root| &root.real)).collect();
    let matters = |at: &ItemPath| roots.iter().any(|root| root.is_within(at) || at.is_within(root));
    let mut mounted = Mounted::new(scratch, disks)?;
    let elsewhere = tree.elsewhere.iter().filter(|at| matters(at));
    let mut hidden: BTreeMap<ItemPath, String> =
        elsewhere.map(|at| (at.clone(), ELSEWHERE.to_owned())).collect();
    for mount in tree.mounts.iter().filter(|mount| matters(&mount.at)) {
        let outcome = match tree.volumes.get(mount.volume).and_then(|volume| volume.stretch.clone()) {
            Some((disk, range)) => mounted.mount(mount, disk, &range),
            None => {
                Err(Error::new(Code::Unsupported, "its volume is encrypted, or not in one piece on one disk"))
            }
        };
        match outcome {
            Ok(()) => {}
            Err(error) if mount.at.is_root() => {
                let what = "the machine's root cannot be mounted, and its newer files not be put there";
                return Err(error.during(what).hint(ALTERNATIVE));
            }
            Err(error) => drop(hidden.insert(mount.at.clone(), error.chain().join(": "))),
        }
    }
    Ok((mounted, Arc::new(hidden)))
}

const ELSEWHERE: &str = "what is mounted there is not on the machine's disks, or on none that can be read";

impl Applied {
    fn skip(&mut self, path: ItemPath, detail: String) {
        self.skips.push(Skip { path, reason: SkipReason::Unwritable, detail });
    }

    /// Makes the mounted tree what the point says, where the point looked.
    fn put(
        &mut self,
        repository: &Repository,
        view: &Reachable,
        root: &Path,
        clock: &Arc<dyn Clock>,
        progress: &Arc<dyn Progress>,
    ) -> Result<()> {
        clear_suspects(view, root, progress.as_ref())?;
        // The volumes mounted below the root are parts of the machine, and mirrored as such: this process's own table of
        // mounts, which a mirror asks, does not have them.
        let captured = LeftOut::parse(&view.info().position.0).map(|left| left.roots).unwrap_or_default();
        let (selection, placing) = if captured.iter().any(|captured| captured.real.is_root()) {
            // The machine's own top is as much a part of it as everything below.
            (vec![ItemPath::root()], Placing::Stripped(root.to_owned()))
        } else {
            (Vec::new(), Placing::Below(root.to_owned()))
        };
        let request = RestoreRequest {
            selection,
            placing,
            mode: RestoreMode::Mirror,
            owners: OwnerRule::ByNumber,
            keep: Vec::new(),
        };
        let plan = plan_restore(view, &request, progress.as_ref())?;
        let Restored { counts, changes, skips, damaged } =
            restore(repository, view, &plan, None, clock, progress)?.restored;
        self.bytes += counts.written_bytes;
        self.changes += changes;
        self.skips.extend(skips);
        self.damaged += damaged;
        Ok(())
    }
}

/// Deletes the files of the image that look like those of the point and may not be: of the same size and time, but touched
/// since. A restore compares no content and would take them for the same.
fn clear_suspects(view: &Reachable, root: &Path, progress: &dyn Progress) -> Result<()> {
    let mut place = Place::open(root, OwnerRule::ByNumber)?;
    let Some(captured) = LeftOut::parse(&view.info().position.0) else { return Ok(()) };
    for captured in &captured.roots {
        for seen in view.inner.walk(&captured.real) {
            progress.check()?;
            // What is damaged is met again by the restore, which says so.
            let Ok(seen) = seen else { continue };
            if seen.metadata.kind != Kind::File || view.why_hidden(&seen.path).is_some() {
                continue;
            }
            let Some(existing) = place.look(&seen.path)? else { continue };
            let alike = existing.kind == Kind::File
                && existing.size == seen.metadata.size
                && existing.modified == seen.metadata.modified;
            if alike && place.stamp(&seen.path)?.is_none_or(|stamp| stamp != seen.stamp) {
                place.remove(&seen.path)?;
            }
        }
    }
    Ok(())
}

/// A point of files without what cannot be put where it belongs.
struct Reachable {
    inner: PointReader,
    hidden: Arc<BTreeMap<ItemPath, String>>,
}

impl Reachable {
    /// The place that hides a path, and why.
    fn why_hidden(&self, path: &ItemPath) -> Option<(&ItemPath, &String)> {
        let mut up = std::iter::successors(Some(path.clone()), ItemPath::parent);
        up.find_map(|above| self.hidden.get_key_value(&above))
    }
}

impl PointView for Reachable {
    fn info(&self) -> &PointInfo {
        self.inner.info()
    }

    fn lookup(&self, path: &ItemPath) -> Result<Option<Seen>> {
        PointView::lookup(&self.inner, path)
    }

    fn list(&self, directory: &ItemPath) -> Result<Vec<Seen>> {
        PointView::list(&self.inner, directory)
    }

    fn walk(&self, within: &ItemPath) -> Result<SeenWalk<'_>> {
        PointView::walk(&self.inner, within)
    }

    fn open(&self, path: &ItemPath) -> Result<Box<dyn StreamReader>> {
        PointView::open(&self.inner, path)
    }

    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        PointView::content(&self.inner, path)
    }

    fn skips(&self) -> Result<Vec<Skip>> {
        self.inner.skips()
    }

    fn source(&self, selection: Vec<ItemPath>) -> Result<Box<dyn Source>> {
        let view = Self { inner: self.inner.clone(), hidden: Arc::clone(&self.hidden) };
        Ok(Box::new(ReachableSource {
            inner: PointView::source(&self.inner, selection)?,
            view,
            told: Vec::new(),
        }))
    }
}

/// Yields what can be reached; for the rest one skip for each place that hides it.
struct ReachableSource {
    inner: Box<dyn Source>,
    view: Reachable,
    told: Vec<ItemPath>,
}

impl Source for ReachableSource {
    fn next(&mut self) -> Result<Next> {
        loop {
            let next = self.inner.next()?;
            let Next::Item(item) = &next else { return Ok(next) };
            let Some((place, why)) = self.view.why_hidden(&item.path) else { return Ok(next) };
            if !self.told.contains(place) {
                let (path, reason, detail) = (place.clone(), SkipReason::Unwritable, why.clone());
                self.told.push(path.clone());
                return Ok(Next::Skipped(Skip { path, reason, detail }));
            }
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        self.inner.seal()
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        let Self { inner, .. } = *self;
        inner.commit(receipt)
    }
}

//! Recipes read back: their runs in order.

use mainstay_core::{Error, Result};

use crate::fetch::MetaPages;
use crate::format::directory::Directory;
use crate::format::item::Recipe;
use crate::format::page::{Cursor, Page, PageKind};
use crate::format::run::{Run, RunDigest};
use crate::format::segment::GroupId;

/// The runs of a recipe, in order.
pub(crate) enum Runs {
    Inline(std::vec::IntoIter<Run>),
    Pages(Cursor<MetaPages>),
}

impl Runs {
    pub(crate) fn of(pages: &MetaPages, recipe: &Recipe) -> Result<Self> {
        Ok(match recipe {
            Recipe::None => Self::Inline(Vec::new().into_iter()),
            Recipe::Inline(runs) => Self::Inline(runs.clone().into_iter()),
            Recipe::Pages { root, .. } => {
                Self::Pages(Cursor::seek(pages.clone(), PageKind::Recipe, root, &[])?)
            }
        })
    }

    pub(crate) fn next(&mut self) -> Result<Option<Run>> {
        match self {
            Self::Inline(runs) => Ok(runs.next()),
            Self::Pages(cursor) => match cursor.next()? {
                Some((page, index)) => Run::decode(&mut page.value(index), &page.groups).map(Some),
                None => Ok(None),
            },
        }
    }
}

/// The runs of a recipe by where they lie in the content.
pub(crate) struct Located {
    runs: Runs,
    /// The last run read, and where it starts.
    current: Option<(u64, Run)>,
    /// Where the next one starts.
    end: u64,
}

impl Located {
    pub(crate) fn of(pages: &MetaPages, recipe: &Recipe) -> Result<Self> {
        Ok(Self { runs: Runs::of(pages, recipe)?, current: None, end: 0 })
    }

    /// From the run that holds `offset` on.
    pub(crate) fn seek(pages: &MetaPages, recipe: &Recipe, offset: u64) -> Result<Self> {
        let Recipe::Pages { root, .. } = recipe else { return Self::of(pages, recipe) };
        let cursor = Cursor::seek(pages.clone(), PageKind::Recipe, root, &key_beyond(offset))?;
        Ok(Self { runs: Runs::Pages(cursor), current: None, end: 0 })
    }

    /// The next run and where it starts.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, Run)>> {
        let found = match &mut self.runs {
            Runs::Inline(runs) => runs.next().map(|run| (self.end, run)),
            Runs::Pages(cursor) => match cursor.next()? {
                Some((page, index)) => Some(located(&page, index)?),
                None => None,
            },
        };
        self.end = found.as_ref().map_or(u64::MAX, |(start, run)| start.saturating_add(run.length()));
        Ok(found)
    }

    /// The run that holds `offset`; `None` beyond the end. Offsets must be asked for in ascending order.
    pub(crate) fn at(&mut self, offset: u64) -> Result<Option<(u64, Run)>> {
        if let Runs::Pages(cursor) = &mut self.runs
            && offset >= self.end
        {
            cursor.skip_to(&key_beyond(offset));
        }
        while self.current.is_none() || offset >= self.end {
            self.current = self.next()?;
            if self.current.is_none() {
                return Ok(None);
            }
        }
        Ok(self.current.clone().filter(|(start, _)| *start <= offset))
    }
}

/// Runs in pages are keyed by the byte after them.
fn key_beyond(offset: u64) -> [u8; 8] {
    offset.saturating_add(1).to_be_bytes()
}

fn located(page: &Page, index: usize) -> Result<(u64, Run)> {
    let run = Run::decode(&mut page.value(index), &page.groups)?;
    let end = page.key(index).try_into().map(u64::from_be_bytes).ok();
    let start = end.and_then(|end| end.checked_sub(run.length()));
    start
        .map(|start| (start, run))
        .ok_or_else(|| Error::integrity("a page of runs has a key that is not the end of its run"))
}

/// Checks that the slots of a run hold the chunks that its digest was taken of.
pub(crate) fn check_run(
    directory: &Directory,
    group: &GroupId,
    first: u32,
    count: u32,
    digest: &RunDigest,
) -> Result<()> {
    let end = first as usize + count as usize;
    let Some(chunks) = directory.chunks().get(first as usize..end) else {
        return Err(Error::integrity(format!("a recipe names slots that group {group} does not have")));
    };
    if RunDigest::of(chunks.iter().map(|(id, _)| id)) == *digest {
        Ok(())
    } else {
        Err(Error::integrity(format!("a recipe and the directory of group {group} disagree")))
    }
}

//! The little command line of `cargo xtask`: switches, options with a value, nothing else.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    switches: BTreeSet<String>,
    options: BTreeMap<String, String>,
}

impl Arguments {
    /// Accepts `--switch`, `--option value` and `--option=value` for the names given, and nothing else.
    pub(crate) fn parse(words: &[String], switches: &[&str], options: &[&str]) -> Result<Self> {
        let mut parsed = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            if options.contains(&name) {
                let value = value.or_else(|| words.next().cloned());
                parsed
                    .options
                    .insert(name.to_owned(), value.with_context(|| format!("{name} needs a value"))?);
            } else if switches.contains(&name) && value.is_none() {
                parsed.switches.insert(name.to_owned());
            } else {
                bail!("{word} means nothing here; known are: {}", [switches, options].concat().join(" "));
            }
        }
        Ok(parsed)
    }

    pub(crate) fn has(&self, switch: &str) -> bool {
        self.switches.contains(switch)
    }

    pub(crate) fn value(&self, option: &str) -> Option<&str> {
        self.options.get(option).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::Arguments;

    fn parse(words: &str) -> anyhow::Result<Arguments> {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        Arguments::parse(&words, &["--long"], &["--size"])
    }

    #[test]
    fn switches_and_both_spellings_of_options() {
        let parsed = parse("--long --size full").unwrap();
        assert!(parsed.has("--long"));
        assert_eq!(parsed.value("--size"), Some("full"));
        assert_eq!(parse("--size=small").unwrap().value("--size"), Some("small"));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for words in ["--size", "--long=yes", "--other", "word"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}

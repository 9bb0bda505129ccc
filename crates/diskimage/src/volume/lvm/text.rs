//! The text that LVM keeps its metadata in: `name = value`, `name { … }`, numbers, quoted strings, lists, comments.

use mainstay_core::{Error, Result};

/// How deep sections may lie in each other; LVM's own are four deep.
const DEPTH_MAX: usize = 8;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    Number(u64),
    Text(String),
    List(Vec<Self>),
    Section(Section),
}

/// What stands between braces, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Section(Vec<(String, Value)>);

impl Section {
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        Parser { rest: text }.section(DEPTH_MAX, true)
    }

    pub(super) fn sections(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.0.iter().filter_map(|(name, value)| match value {
            Value::Section(section) => Some((name.as_str(), section)),
            _ => None,
        })
    }

    /// `None` when it is missing or no section.
    pub(super) fn section(&self, name: &str) -> Option<&Self> {
        self.sections().find_map(|(known, section)| (known == name).then_some(section))
    }

    fn value(&self, name: &str) -> Result<&Value> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value).ok_or_else(|| Error::integrity(format!("the metadata has no {name}")))
    }

    pub(super) fn number(&self, name: &str) -> Result<u64> {
        match self.value(name)? {
            Value::Number(number) => Ok(*number),
            other => Err(Error::integrity(format!("the metadata has {name} = {other:?}"))),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<&str> {
        match self.value(name)? {
            Value::Text(text) => Ok(text),
            other => Err(Error::integrity(format!("the metadata has {name} = {other:?}"))),
        }
    }

    pub(super) fn list(&self, name: &str) -> Result<&[Value]> {
        match self.value(name)? {
            Value::List(list) => Ok(list),
            other => Err(Error::integrity(format!("the metadata has {name} = {other:?}"))),
        }
    }

    /// Whether a list of words, such as a status, has this one.
    pub(super) fn says(&self, name: &str, word: &str) -> bool {
        self.list(name)
            .is_ok_and(|list| list.iter().any(|value| matches!(value, Value::Text(text) if text == word)))
    }
}

struct Parser<'a> {
    rest: &'a [u8],
}

impl Parser<'_> {
    /// Passes over white space and comments.
    fn skip(&mut self) {
        loop {
            self.rest = self.rest.trim_ascii_start();
            if self.rest.first() != Some(&b'#') {
                return;
            }
            let line = self.rest.iter().position(|byte| *byte == b'\n').unwrap_or(self.rest.len());
            self.rest = &self.rest[line..];
        }
    }

    fn next(&mut self) -> Option<u8> {
        self.skip();
        self.rest.first().copied()
    }

    fn take(&mut self, byte: u8) -> Result<()> {
        if self.next() != Some(byte) {
            return Err(self.damaged());
        }
        self.rest = &self.rest[1..];
        Ok(())
    }

    fn damaged(&self) -> Error {
        let shown: String = String::from_utf8_lossy(self.rest).chars().take(20).collect();
        Error::integrity(format!("the metadata does not parse at {shown:?}"))
    }

    fn word(&mut self, allowed: impl Fn(&u8) -> bool) -> Result<String> {
        self.skip();
        let length = self.rest.iter().position(|byte| !allowed(byte)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(length);
        if word.is_empty() {
            return Err(self.damaged());
        }
        let word = String::from_utf8_lossy(word).into_owned();
        self.rest = rest;
        Ok(word)
    }

    /// Up to the closing brace, or at the `top` to the end of the text.
    fn section(&mut self, depth: usize, top: bool) -> Result<Section> {
        let mut section = Section::default();
        loop {
            match self.next() {
                None if top => return Ok(section),
                Some(b'}') if !top => {
                    self.rest = &self.rest[1..];
                    return Ok(section);
                }
                _ => {}
            }
            let name = self.word(|byte| byte.is_ascii_alphanumeric() || b"_.+-".contains(byte))?;
            let value = if self.next() == Some(b'{') {
                let depth = depth.checked_sub(1).ok_or_else(|| self.damaged())?;
                self.take(b'{')?;
                Value::Section(self.section(depth, false)?)
            } else {
                self.take(b'=')?;
                self.value(true)?
            };
            section.0.push((name, value));
        }
    }

    fn value(&mut self, lists: bool) -> Result<Value> {
        match self.next() {
            Some(b'"') => self.text().map(Value::Text),
            Some(b'[') if lists => {
                self.take(b'[')?;
                let mut list = Vec::new();
                while self.next() != Some(b']') {
                    list.push(self.value(false)?);
                    if self.next() != Some(b',') {
                        break;
                    }
                    self.take(b',')?;
                }
                self.take(b']')?;
                Ok(Value::List(list))
            }
            _ => {
                let word = self.word(u8::is_ascii_digit)?;
                word.parse().map(Value::Number).map_err(|error| self.damaged().because(error))
            }
        }
    }

    fn text(&mut self) -> Result<String> {
        self.take(b'"')?;
        let mut text = Vec::new();
        loop {
            let (byte, rest) = match self.rest {
                [b'\\', byte, rest @ ..] => (*byte, rest),
                [b'"', rest @ ..] => {
                    self.rest = rest;
                    return Ok(String::from_utf8_lossy(&text).into_owned());
                }
                [byte, rest @ ..] => (*byte, rest),
                [] => return Err(self.damaged()),
            };
            text.push(byte);
            self.rest = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Section, Value};

    #[test]
    fn a_text_as_lvm_writes_it() {
        let text =
            b"vg_a-1 {\n\tid = \"a\\\"b\"\n\tseqno = 4\t# comment }\n status = [\"READ\", \"WRITE\"]\n\
            flags = []\n stripes = [\n\"pv0\", 12\n]\n}\n# end\ncontents = \"Text\"\n\0garbage {{{";
        let parsed = Section::parse(text).unwrap();
        let group = parsed.section("vg_a-1").unwrap();
        assert_eq!((group.text("id").unwrap(), group.number("seqno").unwrap()), ("a\"b", 4));
        assert!(group.says("status", "WRITE") && !group.says("flags", "WRITE"));
        assert_eq!(group.list("stripes").unwrap(), [Value::Text("pv0".into()), Value::Number(12)]);
        assert_eq!(parsed.text("contents").unwrap(), "Text");
    }

    #[test]
    fn what_is_no_such_text_is_an_error() {
        let deep = "a{".repeat(100_000);
        for text in [
            "a",
            "a =",
            "a = [",
            "a = [1,,2]",
            "a = \"x",
            "a {",
            "}",
            "= 1",
            "a = -1",
            "a = 99999999999999999999",
            &deep,
        ] {
            assert!(Section::parse(text.as_bytes()).is_err(), "{text:.20}");
        }
    }
}

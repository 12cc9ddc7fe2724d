//! Finds fields that no message of ours has, at any depth: what they ask for would silently
//! not be done.

use bulkhead_proto::protobuf::MessageDyn;
use bulkhead_proto::protobuf::reflect::{ReflectFieldRef, ReflectValueRef};

/// The first unknown field, as `config.pcie.9`; the number is the field's. `None`: there is
/// none. The parser bounds how deep messages lie in each other.
pub(super) fn field(message: &dyn MessageDyn) -> Option<String> {
    let unknown = message.special_fields_dyn().unknown_fields().iter().next();
    if let Some((number, _)) = unknown {
        return Some(number.to_string());
    }
    message.descriptor_dyn().fields().find_map(|descriptor| {
        let name = descriptor.name();
        match descriptor.get_reflect(message) {
            ReflectFieldRef::Optional(value) => {
                within(&value.value()?).map(|inner| format!("{name}.{inner}"))
            }
            ReflectFieldRef::Repeated(values) => (0..values.len()).find_map(|index| {
                within(&values.get(index)).map(|inner| format!("{name}[{index}].{inner}"))
            }),
            // No message here has a map.
            ReflectFieldRef::Map(_) => None,
        }
    })
}

fn within(value: &ReflectValueRef<'_>) -> Option<String> {
    match value {
        ReflectValueRef::Message(message) => field(&**message),
        _ => None,
    }
}
